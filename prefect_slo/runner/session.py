"""One flow run under way: a thread that feeds the scheduler, does what it says, and completes futures.

Everything that happens (submissions, finished upstream work, reports of backends, timers) arrives in one inbox, so the
scheduler sees one event at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import Context
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from prefect.futures import PrefectFuture
from prefect.logging import get_logger
from prefect.states import Crashed

from prefect_slo.control import Scheduler, StageRule
from prefect_slo.control import events as control
from prefect_slo.plan import Record
from prefect_slo.resources import Capacity
from prefect_slo.runner import endings, parcels, relay
from prefect_slo.runner.backends import protocol
from prefect_slo.runner.backends.protocol import Backend, Bundle
from prefect_slo.runner.calls import Call
from prefect_slo.runner.endings import Endings
from prefect_slo.runner.measure import Measure
from prefect_slo.runner.parcels import Parcels
from prefect_slo.runner.write_behind import WriteBehind

GRACE_S = 1.0
"""A task's own timeout has this long to take effect inside the worker before the worker is killed."""


class Session:
    """Runs the calls of one flow run.

    Args:
        run_key: Names the flow run.
        backends: By pool name.
        context: The flow's context, in which futures are completed and events sent.
        measure: Hears what was measured.
        notice: Tells the user something, once each; with a stage where that has moved to threads.
        level: Record level of a stage's next bundle, given its stage, its measured item time and its items so far.
        capacity: By pool, what the run's leases may hold together.
    """

    def __init__(
        self,
        run_key: str,
        backends: Mapping[str, Backend],
        *,
        context: Context,
        measure: Measure,
        notice: Callable[[str, str | None], None],
        level: Callable[[str], Record],
        capacity: Mapping[str, Capacity],
    ) -> None:
        self._run_key, self._backends, self._context = run_key, backends, context
        self._measure, self._notice, self._level = measure, notice, level
        self._scheduler = Scheduler(capacity)
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._calls: dict[int, Call] = {}
        self._reports: dict[int, protocol.ItemReport] = {}
        self._records: dict[int, Record] = {}
        self._batches: dict[int, tuple[int, ...]] = {}  # items that run as one, by the first of them
        self._sent: dict[int, control.Dispatch] = {}
        self._writer = WriteBehind(context.copy())
        self._endings = Endings(context, measure, self._writer)
        self._parcels = Parcels(run_key, context)
        self._events_of_run = relay.FlowRunEvents(context.copy())
        self._rules: dict[str, StageRule] = {}
        self._pool_of: dict[int, str] = {}
        self._can: dict[str, protocol.Capabilities] = {}
        self._loss: protocol.Lost | None = None
        self._timer_at: float | None = None
        self._broken: BaseException | None = None
        self._gate = threading.Lock()
        self._drained = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="prefect-slo-session", daemon=True)
        self._thread.start()

    def submit(self, stage: str, rule: StageRule | None, calls: list[Call]) -> None:
        """Take calls of one stage; ``rule`` comes before the first or with it. Returns at once."""
        with self._gate:
            if self._broken is None:
                self._inbox.put((stage, rule, calls))
                return
        self._crash(calls, self._broken)

    def close(self, *, at_once: bool) -> None:
        """Submit nothing more; wait for what runs, or with ``at_once`` end it. Idempotent."""
        if not self._thread.is_alive():
            return
        self._inbox.put(control.Closed(now=at_once))
        self._drained.wait()
        self._thread.join(timeout=5)
        self._writer.close()

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not (self._closing and not self._scheduler.unsettled and not self._scheduler.leased):
                message = self._next()
                for event in self._events(message):
                    for action in self._scheduler.handle(event, time.monotonic()):
                        self._do(action)
        except BaseException as error:  # a defect of ours must not leave the flow waiting for ever
            get_logger("slo").exception("The SLO runner failed; its unfinished task runs are crashed.")
            self._abandon(error)
        finally:
            self._drained.set()

    def _next(self) -> Any:
        if self._timer_at is None:
            return self._inbox.get()
        try:
            return self._inbox.get(timeout=max(self._timer_at - time.monotonic(), 0))
        except Empty:
            self._timer_at = None
            return control.Timer()

    def _events(self, message: Any) -> Iterable[control.Event]:
        """What a message means to the scheduler."""
        self._loss = self._whole(message) if isinstance(message, protocol.Lost) else None
        match message:
            case (str(stage), rule, list(calls)):
                return self._submitted(stage, rule, calls)
            case protocol.Progress(lease, _, items):
                return self._progressed(lease, items)
            case protocol.Finished(lease=lease):
                busy_s = self._measure.finished(message)
                return (control.BundleDone(lease, busy_s),)
            case protocol.Opened(lease=lease):
                self._measure.opened(message)
                return (control.LeaseUp(lease),)
            case protocol.Lost(lease=lease, reason=reason) if self._loss is not None:
                self._measure.lost(message)
                return (control.LeaseLost(lease, reason, self._loss.untouched),)
            case protocol.Chatter(payload=payload):
                self._events_of_run.receive(payload)
                return ()
            case control.Closed():
                self._closing = True
                return (message,)
            case _:
                return (message,)

    def _whole(self, lost: protocol.Lost) -> protocol.Lost:
        """A loss that also speaks of the bundle that was on its way when the worker was already gone."""
        sent = self._sent.pop(lost.lease, None)
        if sent is not None and lost.reason == "start" and self._capabilities(self._pool_of[lost.lease]).hosted:
            self._notice(f"A worker of stage {sent.stage!r} did not start: {lost.detail}.", None)
        if sent is not None and sent.bundle != lost.bundle:
            return replace(lost, running=None, untouched=sent.items)
        return replace(lost, untouched=tuple(item for first in lost.untouched for item in self._batches[first]))

    def _submitted(self, stage: str, rule: StageRule | None, calls: list[Call]) -> list[control.Event]:
        events: list[control.Event] = []
        if rule is not None:
            self._rules[stage] = rule
            events.append(control.PlanChanged(stage, rule))
        now = time.monotonic()
        ready, waiting = [], []
        for call in calls:
            self._calls[call.item] = call
            if call.has_inputs and (upstream := parcels.pending(call)):
                waiting.append(call.item)
                self._await(call, upstream)
            else:
                call.ready = now
                ready.append(call.item)
        if ready:
            events.append(control.Submitted(stage, tuple(ready)))
        if waiting:
            events.append(control.Submitted(stage, tuple(waiting), ready=False))
        self._measure.submitted(stage, len(calls), now if ready else None)
        return events

    def _await(self, call: Call, upstream: list[PrefectFuture[Any]]) -> None:
        remaining = [len(upstream)]
        lock = threading.Lock()

        def one_done(_: Any) -> None:
            with lock:
                remaining[0] -= 1
                last = remaining[0] == 0
            if last:
                call.ready = time.monotonic()
                self._inbox.put(control.Ready((call.item,)))

        for future in upstream:
            future.add_done_callback(one_done)

    def _progressed(self, lease: int, reports: tuple[protocol.ItemReport, ...]) -> list[control.Event]:
        done, stuck = [], []
        for whole in reports:
            together = self._batches.pop(whole.item, (whole.item,))
            for report in endings.shares(whole, together):
                call = self._calls.get(report.item)
                if call is None:
                    continue
                if report.outcome.unpicklable:
                    stuck.append(report)
                    continue
                self._reports[report.item] = report
                self._measure.item(lease, report, ready=call.ready, batch=len(together))
                done.append(report.item)
        events: list[control.Event] = [control.ItemDone(lease, tuple(done))] if done else []
        for report in stuck:
            get_logger("slo").debug("Item of lease %s is stuck: %s", lease, report.outcome.unpicklable)
            if (pool := self._pool_of.get(lease)) is not None and self._capabilities(pool).hosted:
                stage = self._calls[report.item].stage
                self._notice(f"A call of stage {stage!r} cannot travel: {report.outcome.unpicklable}.", None)
            self._reports[report.item] = report
            events.append(control.Rejected(lease, (report.item,), ran=not report.outcome.failed))
        return events

    # ---- actions ----------------------------------------------------------------------------------------------------

    def _do(self, action: control.Action) -> None:
        match action:
            case control.Settle(items, ending, attempts):
                for item in items:
                    self._settle(item, ending, attempts)
            case control.Dispatch():
                self._dispatch(action)
            case control.OpenLease(lease, stage, pool, size):
                self._pool_of[lease] = pool
                metered = self._capabilities(pool).metered
                self._measure.leased(lease, stage, pool, size, time.monotonic(), metered=metered)
                self._backends[pool].open(lease, size, self._inbox.put)
            case control.CloseLease(lease):
                self._sent.pop(lease, None)
                self._measure.released(lease, time.monotonic())
                self._backends[self._pool_of.pop(lease)].close(lease)
            case control.CancelBundle(lease):
                self._backends[self._pool_of[lease]].cancel(lease)
            case control.SetTimer(after_s):
                self._timer_at = time.monotonic() + after_s
            case control.Notice(stage, what, detail):
                self._tell(stage, what, detail)

    def _dispatch(self, action: control.Dispatch) -> None:
        pool = self._pool_of[action.lease]
        backend, can = self._backends[pool], self._capabilities(pool)
        isolated = can.isolated and not can.hosted
        record = self._level(action.stage)
        calls = [self._calls[item] for item in action.items]
        items: list[tuple[int, Any]] = []
        rejected: list[int] = []
        begun = time.monotonic()
        batch = self._rules[action.stage].batch if record != "full" else 1
        for first in range(0, len(calls), batch):
            together = calls[first : first + batch]
            try:
                items.append((together[0].item, self._parcels.payload(together, record, isolated=isolated)))
                self._batches[together[0].item] = tuple(call.item for call in together)
            except Exception as error:
                for call in together:
                    self._reports[call.item] = _stuck(call.item, error)
                    rejected.append(call.item)
        opened: Any = None
        if items:
            try:
                inline = self._rules[action.stage].workers is not None
                if can.hosted:
                    opened = self._parcels.hosted(action.stage, calls[0])
                else:
                    opened = self._parcels.program(action.stage, calls[0], isolated=isolated, inline=inline)
            except Exception as error:
                for item in action.items:
                    self._reports[item] = _stuck(item, error)
                rejected, items = list(action.items), []
        if rejected:
            self._inbox.put(control.Rejected(action.lease, tuple(rejected), ran=False))
        if not items:
            self._inbox.put(control.BundleDone(action.lease, 0.0))
            return
        bundle = Bundle(
            action.bundle,
            f"{self._run_key}/{action.stage}",
            opened,
            tuple(items),
            timeout_s=_hard_limit(calls) if can.hard_timeouts and not can.hosted else None,
        )
        self._records.update(dict.fromkeys(action.items, record))
        self._sent[action.lease] = action
        self._measure.dispatched(action.lease, action.bundle, begun, min(call.ready for call in calls))
        backend.submit(action.lease, bundle)

    def _capabilities(self, pool: str) -> protocol.Capabilities:
        if pool not in self._can:
            self._can[pool] = self._backends[pool].capabilities()
        return self._can[pool]

    def _tell(self, stage: str, what: str, detail: str) -> None:
        if what == "fallback":
            self._notice(f"Stage {stage!r} runs on threads from now on: {detail}.", stage)
        elif what == "grown":
            self._notice(f"Stage {stage!r} ran out of memory and moves to workers of {detail}.", None)

    # ---- endings ----------------------------------------------------------------------------------------------------

    def _settle(self, item: int, ending: control.Ending, attempts: int) -> None:
        call = self._calls.pop(item, None)
        if call is None:
            return
        report = self._reports.pop(item, None)
        record = self._records.pop(item, None)
        if ending == "done" and report is not None:
            self._endings.done(call, report, record)
        elif ending == "cancelled" and (self._loss is None or item in self._loss.untouched):
            self._endings.dropped(call)
        else:
            self._endings.lost(call, ending, attempts, loss=self._loss, report=report)

    def _abandon(self, error: BaseException) -> None:
        with self._gate:  # what is submitted from now on is crashed where it is submitted
            self._broken = error
        while not self._inbox.empty():
            match self._inbox.get():
                case (str(), _, list(calls)):
                    self._crash(calls, error)
        self._crash(list(self._calls.values()), error)
        self._calls.clear()
        for lease, pool in self._pool_of.items():
            self._backends[pool].cancel(lease)

    @staticmethod
    def _crash(calls: list[Call], error: BaseException) -> None:
        for call in calls:
            if not call.future.done():
                call.future.set_result(Crashed(message=f"The SLO runner failed: {error}", data=error))


def _stuck(item: int, error: Exception) -> protocol.ItemReport:
    """Stands for the report of an item that never left."""
    return protocol.ItemReport(item, protocol.Outcome(b"", True, f"{type(error).__name__}: {error}"), 0.0, 0.0)


def _hard_limit(calls: list[Call]) -> float | None:
    """Seconds after which a call of the bundle can only hang: every attempt has had its timeout, and time to notice.

    A tagged call may rightly wait for a concurrency slot for ever: it has no limit.
    """
    task = calls[0].task
    if not task.timeout_seconds or task.tags or any(call.tags for call in calls):
        return None
    delays = task.retry_delay_seconds
    each = delays if isinstance(delays, list) else [delays or 0.0]
    waits = sum(float(each[min(i, len(each) - 1)]) for i in range(task.retries)) if each else 0.0
    return (task.retries + 1) * (task.timeout_seconds + GRACE_S) + waits * (1 + (task.retry_jitter_factor or 0.0))

"""One flow run under way: a thread that feeds the scheduler, does what it says, and completes futures.

Everything that happens (submissions, finished upstream work, reports of backends, timers) arrives in one inbox, so the
scheduler sees one event at a time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextvars import Context
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Any

from prefect.logging import get_logger

from prefect_slo.control import Scheduler, StageRule
from prefect_slo.control import events as control
from prefect_slo.errors import ResultLost
from prefect_slo.plan import Record
from prefect_slo.resources import Capacity
from prefect_slo.runner import deposits, endings, parcels, relay
from prefect_slo.runner.ahead import Ahead
from prefect_slo.runner.backends import protocol
from prefect_slo.runner.backends.protocol import Backend, Bundle
from prefect_slo.runner.calls import OVER, Call
from prefect_slo.runner.deposits import Deposits
from prefect_slo.runner.endings import Endings
from prefect_slo.runner.futures import Callbacks
from prefect_slo.runner.measure import Measure
from prefect_slo.runner.parcels import Parcels
from prefect_slo.runner.pools import PROCESS
from prefect_slo.runner.write_behind import WriteBehind

GRACE_S = 30.0
"""What an attempt has at least beyond its task's own timeout, which counts the function alone: arguments have to be
unpickled, inputs resolved, results written. Only what hangs for longer has its worker killed."""


class Session:
    """Runs the calls of one flow run.

    Args:
        run_key: Names the flow run.
        backends: By pool name.
        context: The flow's context, in which futures are completed and events sent.
        measure: Hears what was measured.
        notice: Tells the user something, once each; with a stage where that has moved to threads.
        level: Record level of the bundle that a call is in.
        capacity: By pool, what the run's leases may hold together.
        shelf_bytes: What results may take in memory that worker processes share.
        stays: Whether results of a stage may stay where they are made, where its pool can keep them.
    """

    def __init__(
        self,
        run_key: str,
        backends: Mapping[str, Backend],
        *,
        context: Context,
        measure: Measure,
        notice: Callable[[str, str | None], None],
        level: Callable[[Call], Record],
        capacity: Mapping[str, Capacity],
        shelf_bytes: float = 0.0,
        stays: Callable[[str], bool] = lambda stage: True,
    ) -> None:
        self._run_key, self._backends, self._context = run_key, backends, context
        self._measure, self._notice, self._level, self._stays = measure, notice, level, stays
        self._scheduler = Scheduler(capacity)
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._calls: dict[int, Call] = {}
        self._reports: dict[int, protocol.ItemReport] = {}
        self._records: dict[int, Record] = {}
        self._sent: dict[int, _Sent] = {}
        self._writer = WriteBehind(context.copy())
        self._deposits = Deposits()
        self._endings = Endings(context, measure, self._writer, self._deposits)
        self._parcels = Parcels(run_key, context, shelf_bytes)
        self._events_of_run = relay.FlowRunEvents(context.copy())
        self._ahead = Ahead(backends, self._capabilities)
        self._rules: dict[str, StageRule] = {}
        self._pool_of: dict[int, str] = {}
        self._can: dict[str, protocol.Capabilities] = {}
        self._loss: protocol.Lost | None = None
        self._timer_at: float | None = None
        self._broken: BaseException | None = None
        self._gate = threading.Lock()
        self.callbacks = Callbacks(idle=lambda: self._inbox.put(None))
        self._drained = threading.Event()
        self._closing: control.Closed | None = None
        self._over = False
        self._thread = threading.Thread(target=self._run, name="prefect-slo-session", daemon=True)
        self._thread.start()

    def submit(self, stage: str, rule: StageRule | None, calls: list[Call]) -> None:
        """Take calls of one stage; ``rule`` comes before the first or with it. Returns at once."""
        with self._gate:
            if self._over:
                raise RuntimeError(OVER)
            if self._broken is None:
                self._inbox.put((stage, rule, calls))
                return
        for call in calls:
            self._endings.broken(call, self._broken)

    def close(self, *, at_once: bool) -> None:
        """Wait for everything that was submitted, or with ``at_once`` end it. Idempotent."""
        try:
            if self._thread.is_alive():
                self._inbox.put(control.Closed(now=at_once))
                self._drained.wait()
        except BaseException:  # Ctrl-C, once more
            at_once = True
            self._inbox.put(control.Closed(now=True))
            raise
        finally:
            try:
                self._thread.join(timeout=5)
                self._deposits.close(at_once=at_once)
            finally:
                self._parcels.close()
                self._writer.close()

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._finished():
                message = self._next()
                for event in self._events(message):
                    self._ahead.heard(event)
                    for action in self._scheduler.handle(event, time.monotonic()):
                        self._ahead.did(action)
                        self._do(action)
                self._ahead.tell()
        except BaseException as error:  # a defect of ours must not leave the flow waiting for ever
            get_logger("slo").exception("The SLO runner failed; its unfinished task runs are crashed.")
            self._abandon(error)
        finally:
            self._drained.set()

    def _finished(self) -> bool:
        """Whether nothing is left to do; from then on nothing is taken either."""
        if self._closing is None or self._scheduler.unsettled or self._scheduler.leased:
            return False
        if self.callbacks.outstanding and not self._closing.now:
            return False
        with self._gate:
            self._over = self._inbox.empty()
        return self._over

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
                self._pass_on(payload)
                return ()
            case control.Closed():
                if self._closing is None or message.now:
                    self._closing = message
                return (message,)
            case control.Ready(items) if self._closing is not None:
                for item in items:
                    self._calls[item].late = True
                return (message,)
            case None:  # the last callback has ended
                return ()
            case _:
                return (message,)

    def _pass_on(self, payload: bytes) -> None:
        try:
            self._events_of_run.receive(payload)
        except Exception:
            get_logger("slo").warning("An event or log of a worker is lost.", exc_info=True)

    def _whole(self, lost: protocol.Lost) -> protocol.Lost:
        """A loss that also speaks of the bundle that was on its way when the worker was already gone."""
        sent = self._sent.pop(lost.lease, None)
        pool = self._pool_of.get(lost.lease)
        if lost.reason == "start" and pool is not None and self._away(pool):
            stage = self._measure.stage_of(lost.lease)
            self._notice(f"A worker of stage {stage!r} did not start: {lost.detail.rstrip('.')}.", None)
        if sent is None:
            return lost
        if sent.bundle != lost.bundle:
            return replace(lost, running=None, untouched=sent.items)
        return replace(lost, untouched=tuple(item for first in lost.untouched for item in sent.together(first)))

    def _submitted(self, stage: str, rule: StageRule | None, calls: list[Call]) -> list[control.Event]:
        events: list[control.Event] = []
        if rule is not None:
            self._rules[stage] = rule
            events.append(control.PlanChanged(stage, rule))
        now = time.monotonic()
        any_ready = False
        for kind, alike in groupby(calls, lambda call: call.kind):
            ready, waiting = [], []
            for call in alike:
                try:
                    awaited = call.has_inputs and self._await(call)
                except BaseException as error:  # a future or an argument of somebody else's making
                    self._endings.broken(call, error)
                    continue
                self._calls[call.item] = call
                if awaited:
                    waiting.append(call.item)
                else:
                    call.ready = now
                    ready.append(call.item)
            if ready:
                any_ready = True
                events.append(control.Submitted(stage, tuple(ready), kind=kind))
            if waiting:
                events.append(control.Submitted(stage, tuple(waiting), ready=False, kind=kind))
        self._measure.submitted(stage, len(calls), now if any_ready else None)
        return events

    def _await(self, call: Call) -> bool:
        """Hear of the moment when a call's upstream is done; ``False`` where it is already."""
        upstream = parcels.pending(call)
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
            wrapped = getattr(future, "wrapped_future", None)  # its own callbacks may wait for each other
            (wrapped if isinstance(wrapped, Future) else future).add_done_callback(one_done)
        return bool(upstream)

    def _progressed(self, lease: int, reports: tuple[protocol.ItemReport, ...]) -> list[control.Event]:
        done, stuck = [], []
        sent = self._sent.get(lease)
        for whole in reports:
            together = sent.together(whole.item) if sent is not None else (whole.item,)
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
        calls = [self._calls[item] for item in action.items]
        record = self._level(calls[0])
        variant, rule = calls[0].variant, calls[0].kind or self._rules[action.stage]
        items: list[tuple[int, Any]] = []
        batches: dict[int, tuple[int, ...]] = {}
        parts: list[protocol.Kept] = []
        leave = partial(deposits.dump_call, place=backend, parts=parts) if can.keeps is not None else None
        rejected: list[int] = []
        begun = time.monotonic()
        batch = rule.batch if record != "full" else 1
        for first in range(0, len(calls), batch):
            together = calls[first : first + batch]
            try:
                where = {"here": pool == PROCESS, "elsewhere": can.elsewhere}
                payload = self._parcels.payload(together, record, isolated=isolated, leave=leave, **where)
                items.append((together[0].item, payload))
                if len(together) > 1:
                    batches[together[0].item] = tuple(call.item for call in together)
            except ResultLost as error:
                for call in together:
                    self._reports[call.item] = protocol.ItemReport(call.item, protocol.Outcome(error, True), 0.0, 0.0)
                    self._inbox.put(control.ItemDone(action.lease, (call.item,)))
            except BaseException as error:
                for call in together:
                    self._reports[call.item] = _stuck(call.item, error)
                    rejected.append(call.item)
        opened: Any = None
        if items:
            try:
                inline = self._rules[action.stage].workers is not None
                if can.hosted:
                    opened = self._parcels.hosted(variant)
                else:
                    where = {"isolated": isolated, "elsewhere": can.elsewhere, "apart": can.keeps is not None}
                    opened = self._parcels.program(variant, inline=inline, **where)
            except BaseException as error:
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
            f"{self._run_key}/{variant.ordinal if isolated or can.hosted else action.stage}",
            opened,
            tuple(items),
            timeout_s=_hard_limit(calls) if can.hard_timeouts and not can.hosted else None,
            parts=tuple(parts),
            keep=can.keeps if self._stays(action.stage) else None,
        )
        self._records.update(dict.fromkeys(action.items, record))
        self._sent[action.lease] = _Sent(action.bundle, action.items, batches)
        self._measure.dispatched(action.lease, action.bundle, begun, min(call.ready for call in calls))
        backend.submit(action.lease, bundle)

    def _capabilities(self, pool: str) -> protocol.Capabilities:
        if pool not in self._can:
            self._can[pool] = self._backends[pool].capabilities()
        return self._can[pool]

    def _away(self, pool: str) -> bool:
        """Whether a pool's workers are not this machine's, so that a user has to hear why they don't start."""
        can = self._capabilities(pool)
        return can.hosted or can.elsewhere

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
        try:
            self._end(call, ending, attempts, report, record)
        except BaseException as error:
            get_logger("slo").exception("The end of a call of stage %r could not be told.", call.stage)
            self._endings.broken(call, error)

    def _end(
        self,
        call: Call,
        ending: control.Ending,
        attempts: int,
        report: protocol.ItemReport | None,
        record: Record | None,
    ) -> None:
        if ending == "done" and report is not None:
            self._endings.done(call, report, record)
        elif ending == "cancelled" and (self._loss is None or call.item in self._loss.untouched):
            self._endings.dropped(call)
        else:
            self._endings.lost(call, ending, attempts, loss=self._loss, report=report)

    def _abandon(self, error: BaseException) -> None:
        with self._gate:  # what is submitted from now on is crashed where it is submitted
            self._broken = error
        while not self._inbox.empty():
            match self._inbox.get():
                case (str(), _, list(calls)):
                    self._calls.update((call.item, call) for call in calls)
        for lease, pool in self._pool_of.items():
            with contextlib.suppress(Exception):
                self._backends[pool].cancel(lease)
        for call in self._calls.values():
            self._endings.broken(call, error)
        self._calls.clear()


@dataclass(frozen=True, slots=True)
class _Sent:
    """What a lease was sent last.

    Attributes:
        bundle: Its id.
        items: In order.
        batches: Items that run as one, by the first of them.
    """

    bundle: int
    items: tuple[int, ...]
    batches: dict[int, tuple[int, ...]]

    def together(self, first: int) -> tuple[int, ...]:
        """Items that run as one with this."""
        return self.batches.get(first, (first,))


def _stuck(item: int, error: BaseException) -> protocol.ItemReport:
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
    grace_s = max(GRACE_S, task.timeout_seconds)
    return (task.retries + 1) * (task.timeout_seconds + grace_s) + waits * (1 + (task.retry_jitter_factor or 0.0))

"""One flow run under way: a thread that feeds the scheduler, does what it says, and completes futures.

Everything that happens (submissions, finished upstream work, reports of backends, timers) arrives in one inbox, so the
scheduler sees one event at a time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import Context
from dataclasses import dataclass
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Any

from prefect.logging import get_logger

from prefect_slo.control import Scheduler, StageRule
from prefect_slo.control import events as control
from prefect_slo.plan import Record
from prefect_slo.resources import Capacity
from prefect_slo.runner import parcels, relay
from prefect_slo.runner.ahead import Ahead
from prefect_slo.runner.backends import protocol
from prefect_slo.runner.backends.protocol import Backend
from prefect_slo.runner.calls import OVER, Call
from prefect_slo.runner.deposits import Deposits
from prefect_slo.runner.dispatching import Dispatcher
from prefect_slo.runner.endings import Endings
from prefect_slo.runner.futures import Callbacks
from prefect_slo.runner.leases import Leases
from prefect_slo.runner.measure import Measure
from prefect_slo.runner.packing import Packer
from prefect_slo.runner.parcels import Parcels
from prefect_slo.runner.remaking import Asked, Remaking
from prefect_slo.runner.supplies import Supplies
from prefect_slo.runner.under_way import CallsUnderWay
from prefect_slo.runner.write_behind import WriteBehind


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
        items: Ids for calls.
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
        items: Iterator[int],
        shelf_bytes: float = 0.0,
        stays: Callable[[str], bool] = lambda stage: True,
    ) -> None:
        self._measure, self._notice = measure, notice
        self._scheduler = Scheduler(capacity)
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._leases = Leases(backends, measure, self._inbox.put)
        self._writer = WriteBehind(context.copy())
        self._remaking = Remaking(
            items, lambda call: self._inbox.put((call.stage, None, [call])), self._ask, self._made_again
        )
        self._deposits = Deposits(self._remaking.wait)
        self._endings = Endings(context, measure, self._writer, self._deposits)
        self._calls = CallsUnderWay(self._endings, self._leases, measure, notice)
        self._supplies = Supplies(
            self._deposits, self._remaking.again, look=self._look, home=lambda: self._inbox.put(None), context=context
        )
        self._parcels = Parcels(run_key, context, shelf_bytes)
        self._dispatcher = Dispatcher(
            self._calls,
            self._leases,
            Packer(run_key, self._parcels, level, stays),
            self._supplies,
            self._remaking,
            measure,
            look=self._look,
        )
        self._events_of_run = relay.FlowRunEvents(context.copy())
        self._ahead = Ahead(backends, self._leases.capabilities)
        self._rules: dict[str, StageRule] = {}
        self._follow_ups: deque[control.Event] = deque()
        self._loss: protocol.Lost | None = None
        self._timer_at: float | None = None
        self._broken: BaseException | None = None
        self._gate = threading.Lock()
        self.callbacks = Callbacks(idle=lambda: self._inbox.put(None))
        self._drained = threading.Event()
        self._closing: control.Closed | None = None
        self._over = self._failed = False
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

    def close(self, *, at_once: bool, failed: bool = False) -> None:
        """Wait for everything that was submitted, or with ``at_once`` end it. Idempotent.

        Args:
            at_once: Whether to wait for nothing.
            failed: Whether the flow has raised: nobody reads its results any more, and none is brought here.
        """
        self._failed = self._failed or failed
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
                self._supplies.close()
                if at_once:
                    self._deposits.close(bring=False)
                else:
                    self._deposits.close(bring=not self._failed, why="its flow run failed")
            finally:
                self._parcels.close()
                self._writer.close()

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._finished():
                message = self._next()
                for event in self._events(message):
                    self._handle(event)
                    self._loss = None  # what follows is no part of it
                    while self._follow_ups:
                        self._handle(self._follow_ups.popleft())
                self._ahead.tell()
        except BaseException as error:  # a defect of ours must not leave the flow waiting for ever
            get_logger("slo").exception("The SLO runner failed; its unfinished task runs are crashed.")
            self._abandon(error)
        finally:
            self._drained.set()

    def _handle(self, event: control.Event) -> None:
        self._ahead.heard(event)
        for action in self._scheduler.handle(event, time.monotonic()):
            self._ahead.did(action)
            self._do(action)

    def _finished(self) -> bool:
        """Whether nothing is left to do; from then on nothing is taken either."""
        if self._closing is None or self._scheduler.unsettled or self._scheduler.leased:
            return False
        if not self._closing.now and (self.callbacks.outstanding or not (self._failed or self._supplies.all_here())):
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
                return self._calls.reported(lease, items)
            case protocol.Finished(lease=lease):
                busy_s = self._measure.finished(message)
                return (control.BundleDone(lease, busy_s),)
            case protocol.Opened(lease=lease):
                self._measure.opened(message)
                if message.no_gpu:
                    self._say_no_gpu(self._measure.stage_of(lease), self._leases.pool_of(lease))
                return (control.LeaseUp(lease),)
            case protocol.Lost(lease=lease, reason=reason) if self._loss is not None:
                self._measure.lost(message)
                return (control.LeaseLost(lease, reason, self._loss.untouched, self._loss.inputs_gone),)
            case protocol.Chatter(payload=payload):
                self._pass_on(payload)
                return ()
            case control.Closed():
                if self._closing is None or message.now:
                    self._closing = message
                if message.now:
                    self._remaking.end()
                return (message,)
            case control.Ready(items):
                return self._ready(items)
            case _Look(item, error):
                return self._looked(item, error)
            case Asked():
                self._remaking.answer(message)
                return ()
            case None:  # the last callback has ended, or the last result has come
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
        if self._leases.never_started_away(lost):
            stage = self._measure.stage_of(lost.lease)
            self._notice(f"A worker of stage {stage!r} did not start: {lost.detail.rstrip('.')}.", None)
        return self._leases.lost(lost)

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
                    awaited = call.has_inputs and parcels.await_upstream(call, self._inbox.put)
                except BaseException as error:  # a future or an argument of somebody else's making
                    self._endings.broken(call, error)
                    continue
                self._calls.add(call)
                call.ready = call.ready if awaited else now
                if awaited or self._waits(call):
                    waiting.append(call.item)
                else:
                    ready.append(call.item)
            if ready:
                any_ready = True
                events.append(control.Submitted(stage, tuple(ready), kind=kind))
            if waiting:
                events.append(control.Submitted(stage, tuple(waiting), ready=False, kind=kind))
        self._measure.submitted(stage, len(calls), now if any_ready else None)
        return events

    def _ready(self, items: tuple[int, ...]) -> list[control.Event]:
        """Calls whose upstream is done: they can run, unless results that they take have to come first."""
        there = []
        for item in items:
            if (call := self._calls.get(item)) is None:
                continue  # the run was cut short
            call.late = self._closing is not None
            if not self._waits(call):
                there.append(item)
        return [control.Ready(tuple(there))] if there else []

    # ---- results that stay elsewhere --------------------------------------------------------------------------------

    def _waits(self, call: Call) -> bool:
        """Whether a call has to wait for results that it takes; they are seen to."""
        return self._dispatcher.waits(call, self._rules[call.stage])

    def _look(self, item: int, error: BaseException | None) -> None:
        """From any thread: what a call waits for has come, or never will."""
        self._inbox.put(_Look(item, error))

    def _looked(self, item: int, error: BaseException | None) -> list[control.Event]:
        """What a call waited for has come, or never will."""
        if (call := self._calls.get(item)) is None:
            return []
        if error is not None:
            self._calls.barred(item, error)
            return [control.Barred((item,))]
        return [] if self._waits(call) else [control.Ready((item,))]

    def _made_again(self, call: Call, why: str) -> None:
        self._notice(f"Stage {call.stage!r} runs a call again: what it returned is lost ({why}).", None)
        self._measure.failed(call.stage)  # what the stage takes in this run is no measure of it

    def _ask(self, asked: Asked) -> bool:
        """From any other thread: whether the session hears of it."""
        if threading.current_thread() is self._thread:
            return False
        with self._gate:
            if self._over or self._broken is not None:
                return False
            self._inbox.put(asked)
        return True

    # ---- actions ----------------------------------------------------------------------------------------------------

    def _do(self, action: control.Action) -> None:
        match action:
            case control.Settle():
                self._calls.settle(action, self._loss)
            case control.Dispatch(stage=stage):
                self._follow_ups.extend(self._dispatcher.dispatch(action, self._rules[stage]))
            case control.OpenLease():
                self._leases.open(action)
            case control.CloseLease(lease):
                self._leases.close(lease)
            case control.CancelBundle(lease):
                self._leases.cancel(lease)
            case control.SetTimer(after_s):
                self._timer_at = time.monotonic() + after_s
            case control.Notice(stage, what, detail):
                self._tell(stage, what, detail)

    def _tell(self, stage: str, what: str, detail: str) -> None:
        if what == "fallback":
            self._notice(f"Stage {stage!r} runs on threads from now on: {detail}.", stage)
        elif what == "grown":
            self._notice(f"Stage {stage!r} ran out of memory and moves to workers of {detail}.", None)

    def _say_no_gpu(self, stage: str, pool: str | None) -> None:
        if pool is not None:
            self._notice(
                f"Stage {stage!r} was to have a GPU, and the machine where pool {pool!r} has put its worker has none: "
                "it runs on the CPU there, and is measured apart. A plan's prediction does not hold for it.",
                None,
            )

    def _abandon(self, error: BaseException) -> None:
        with self._gate:  # what is submitted from now on is crashed where it is submitted
            self._broken = error
        while not self._inbox.empty():
            match self._inbox.get():
                case (str(), _, list(calls)):
                    for call in calls:
                        self._calls.add(call)
                case Asked(answer=answer):
                    answer.set_result(False)
        self._leases.end()
        self._calls.abandon(error)


@dataclass(frozen=True, slots=True)
class _Look:
    """It is worth looking again whether an item lacks something; or something that it takes can't be had."""

    item: int
    error: BaseException | None

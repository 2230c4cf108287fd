"""One flow run under way: a thread that feeds the scheduler, does what it says, and completes futures.

Everything that happens (submissions, finished upstream work, reports of backends, timers) arrives in one inbox, so the
scheduler sees one event at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextvars import Context
from datetime import UTC, datetime, timedelta
from queue import Empty, SimpleQueue
from typing import Any

import cloudpickle
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.logging import get_logger
from prefect.states import Cancelled, Crashed, Failed
from prefect.utilities.annotations import quote
from prefect.utilities.collections import StopVisiting, visit_collection
from prefect.utilities.engine import link_state_to_task_run_result

from prefect_slo.control import Scheduler, StageRule
from prefect_slo.control import events as control
from prefect_slo.errors import OutOfMemory, SloError, TaskTimedOut, Unpicklable, WorkerLost
from prefect_slo.plan import Record
from prefect_slo.runner import engine, program, relay
from prefect_slo.runner.backends import protocol
from prefect_slo.runner.backends.protocol import Backend, Bundle
from prefect_slo.runner.calls import Call, Raised, Returned
from prefect_slo.runner.measure import Measure
from prefect_slo.runner.payloads import importable_by_workers
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
        notice: Tells the user something, once each.
        level: Record level of a stage's next bundle, given its stage, its measured item time and its items so far.
    """

    def __init__(
        self,
        run_key: str,
        backends: Mapping[str, Backend],
        *,
        context: Context,
        measure: Measure,
        notice: Callable[[str], None],
        level: Callable[[str], Record],
        capacity: Mapping[str, float | None],
    ) -> None:
        self._run_key, self._backends, self._context = run_key, backends, context
        self._measure, self._notice, self._level = measure, notice, level
        self._scheduler = Scheduler(capacity)
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._calls: dict[int, Call] = {}
        self._reports: dict[int, protocol.ItemReport] = {}
        self._records: dict[int, Record] = {}
        self._writer = WriteBehind(context.copy())
        self._rules: dict[str, StageRule] = {}
        self._pool_of: dict[int, str] = {}
        self._loss: protocol.Lost | None = None
        self._programs: dict[str, bytes] = {}
        self._flow_context: bytes | None = None
        self._timer_at: float | None = None
        self._broken: BaseException | None = None
        self._drained = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="prefect-slo-session", daemon=True)
        self._thread.start()

    def submit(self, stage: str, rule: StageRule | None, calls: list[Call]) -> None:
        """Take calls of one stage; ``rule`` comes with the first. Returns at once."""
        self._inbox.put((stage, rule, calls))

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
            self._broken = error
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
        self._loss = message if isinstance(message, protocol.Lost) else None
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
            case protocol.Lost(lease=lease, reason=reason, untouched=untouched):
                self._measure.lost(message)
                return (control.LeaseLost(lease, reason, untouched),)
            case protocol.Chatter(payload=payload):
                relay.receive(payload, self._context)
                return ()
            case control.Closed():
                self._closing = True
                return (message,)
            case _:
                return (message,)

    def _submitted(self, stage: str, rule: StageRule | None, calls: list[Call]) -> list[control.Event]:
        events: list[control.Event] = []
        if rule is not None:
            self._rules[stage] = rule
            events.append(control.PlanChanged(stage, rule))
        now = time.monotonic()
        ready, waiting = [], []
        for call in calls:
            self._calls[call.item] = call
            if call.has_inputs and (upstream := _pending(call)):
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
        for report in reports:
            call = self._calls.get(report.item)
            if call is None:
                continue
            if report.outcome.unpicklable:
                stuck.append(report)
                continue
            self._reports[report.item] = report
            self._measure.item(lease, report, ready=call.ready)
            done.append(report.item)
        events: list[control.Event] = [control.ItemDone(lease, tuple(done))] if done else []
        for report in stuck:
            get_logger("slo").debug("Item of lease %s is stuck: %s", lease, report.outcome.unpicklable)
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
                self._measure.leased(lease, stage, size, time.monotonic())
                self._backends[pool].open(lease, size, self._inbox.put)
            case control.CloseLease(lease):
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
        backend = self._backends[pool]
        isolated = backend.capabilities().isolated
        record = self._level(action.stage)
        calls = [self._calls[item] for item in action.items]
        items: list[tuple[int, Any]] = []
        rejected: list[int] = []
        begun = time.monotonic()
        for call in calls:
            try:
                items.append((call.item, self._payload(call, record, isolated=isolated)))
            except Exception as error:
                self._reports[call.item] = _stuck(call.item, error)
                rejected.append(call.item)
        opened: Any = None
        if items:
            try:
                opened = self._program(action.stage, calls[0], pool, isolated=isolated)
            except Exception as error:
                for item, _ in items:
                    self._reports[item] = _stuck(item, error)
                rejected, items = list(action.items), []
        if rejected:
            self._inbox.put(control.Rejected(action.lease, tuple(rejected), ran=False))
        if not items:
            self._inbox.put(control.BundleDone(action.lease, 0.0))
            return
        timeout = calls[0].task.timeout_seconds
        bundle = Bundle(
            action.bundle,
            f"{self._run_key}/{action.stage}",
            opened,
            tuple(items),
            timeout_s=timeout + GRACE_S if timeout and backend.capabilities().hard_timeouts else None,
        )
        if record == "summary":
            self._records.update(dict.fromkeys(action.items, record))
        self._measure.dispatched(action.lease, action.bundle, begun, min(call.ready for call in calls))
        backend.submit(action.lease, bundle)

    def _payload(self, call: Call, record: Record, *, isolated: bool) -> Any:
        if not isolated:
            return (call, record)
        if not call.has_inputs:
            return program.dump_call(call, call.parameters, call.wait_for, record)
        parameters = {name: _futures_to_states(value) for name, value in call.parameters.items()}
        wait_for = [_futures_to_states(value) for value in call.wait_for] if call.wait_for else None
        return program.dump_call(call, parameters, wait_for, record)

    def _program(self, stage: str, call: Call, pool: str, *, isolated: bool) -> Any:
        if not isolated:
            return program.ThreadProgram(inline=self._rules[stage].workers is not None)
        if stage not in self._programs:
            importable_by_workers(call.task.fn)
            if self._flow_context is None:
                self._flow_context = self._context.copy().run(program.dump_context)
            task = cloudpickle.dumps(call.task)
            opened = program.ProcessProgram(self._run_key, self._flow_context, task)
            self._programs[stage] = bytes(cloudpickle.dumps(opened))
        return self._programs[stage]

    def _tell(self, stage: str, what: str, detail: str) -> None:
        if what == "fallback":
            self._notice(f"Stage {stage!r} runs on threads from now on: {detail}.")
        elif what == "grown":
            self._notice(f"Stage {stage!r} ran out of memory and moves to workers of {detail}.")

    # ---- endings ----------------------------------------------------------------------------------------------------

    def _settle(self, item: int, ending: control.Ending, attempts: int) -> None:
        call = self._calls.pop(item, None)
        if call is None:
            return
        report = self._reports.pop(item, None)
        record = self._records.pop(item, None)
        if ending == "done" and report is not None:
            self._complete(call, report, record)
            return
        if ending == "cancelled" and (self._loss is None or item in self._loss.untouched):
            call.future.cancel()
            call.future.set_running_or_notify_cancel()
            self._measure.failed(call.stage)
            return
        error = self._error(call, ending, attempts, report)
        self._end(call, _final_state(ending, error))

    def _complete(self, call: Call, report: protocol.ItemReport, record: Record | None) -> None:
        result = report.outcome.payload
        travelled = isinstance(result, bytes)
        if travelled:
            try:
                result = program.load_result(result)
            except Exception as error:
                self._end(call, Crashed(message=str(error), data=Unpicklable(call.stage, "result", str(error))))
                return
        if isinstance(result, Raised):
            self._measure.failed(call.stage)
            call.future.set_exception(result.error)
            return
        if isinstance(result, Returned):
            state = self._context.run(engine.completed, result.value, call.task_run_id)
            self._context.run(link_state_to_task_run_result, state, result.value)
        else:
            state = result
            if travelled and state.is_completed():
                self._context.run(_link, state)
        if record == "summary":
            self._writer.add(_ended(call, state, report))
        if not state.is_completed():
            self._measure.failed(call.stage)
        call.future.set_result(state)

    def _error(
        self,
        call: Call,
        ending: control.Ending,
        attempts: int,
        report: protocol.ItemReport | None,
    ) -> SloError:
        loss = self._loss
        match ending:
            case "memory" if loss is not None:
                return OutOfMemory(call.stage, loss.peak_mb, loss.limit_mb, attempts)
            case "timeout":
                return TaskTimedOut(call.stage, float(call.task.timeout_seconds or 0), attempts)
            case "unpicklable":
                outcome = report.outcome if report is not None else protocol.Outcome(b"")
                return Unpicklable(call.stage, "argument" if outcome.failed else "result", outcome.unpicklable)
            case "start":
                return WorkerLost(call.stage, f"no worker started: {loss.detail if loss else 'unknown'}", attempts)
            case _:
                return WorkerLost(call.stage, loss.detail if loss is not None else ending, attempts)

    def _end(self, call: Call, state: State[Any]) -> None:
        """End a call that no engine has ended, in Prefect's records too."""
        self._measure.failed(call.stage)
        self._writer.add(_ended(call, state, None))
        call.future.set_result(state)

    def _abandon(self, error: BaseException) -> None:
        for call in list(self._calls.values()):
            if not call.future.done():
                call.future.set_result(Crashed(message=f"The SLO runner failed: {error}", data=error))
        self._calls.clear()
        for lease, pool in self._pool_of.items():
            self._backends[pool].cancel(lease)


def _stuck(item: int, error: Exception) -> protocol.ItemReport:
    """Stands for the report of an item that never left."""
    return protocol.ItemReport(item, protocol.Outcome(b"", True, f"{type(error).__name__}: {error}"), 0.0, 0.0)


def _ended(call: Call, state: State[Any], report: protocol.ItemReport | None) -> engine.Ended:
    started, elapsed_s = None, 0.0
    if report is not None:
        started = datetime.now(UTC) - timedelta(seconds=time.monotonic() - report.started)
        elapsed_s = report.ended - report.started
    return engine.Ended(
        call.task,
        call.task_run_id,
        state,
        tuple(call.parameters),
        call.dependencies,
        call.wait_for,
        call.tags,
        started,
        elapsed_s,
    )


def _final_state(ending: control.Ending, error: SloError) -> State[Any]:
    if ending == "timeout":
        return Failed(name="TimedOut", message=str(error), data=error)
    if ending == "cancelled":
        return Cancelled(message=str(error), data=error)
    return Crashed(message=str(error), data=error)


def _link(state: State[Any]) -> None:
    """Let Prefect recognise the result where the flow passes it on: the link the engine made is in the worker."""
    link_state_to_task_run_result(state, state.result(raise_on_failure=False, _sync=True))  # type: ignore[call-arg]


def _pending(call: Call) -> list[PrefectFuture[Any]]:
    """Futures among a call's inputs that are not done."""
    found: dict[int, PrefectFuture[Any]] = {}

    def look(value: Any, context: dict[str, Any]) -> None:
        if isinstance(context.get("annotation"), quote):
            raise StopVisiting
        if isinstance(value, PrefectFuture) and not _is_done(value):
            found[id(value)] = value

    visit_collection([*call.parameters.values(), *(call.wait_for or ())], look, return_data=False, context={})
    return list(found.values())


def _is_done(future: PrefectFuture[Any]) -> bool:
    wrapped = getattr(future, "wrapped_future", None)
    return wrapped.done() if isinstance(wrapped, Future) else future.state.is_final()


def _futures_to_states(value: Any) -> Any:
    """A parameter with futures (all done) replaced by their final states, annotations kept."""

    def replace(found: Any, context: dict[str, Any]) -> Any:
        if isinstance(context.get("annotation"), quote):
            raise StopVisiting
        if isinstance(found, PrefectFuture):
            found.wait()
            return found.state
        return found

    return visit_collection(value, replace, return_data=True, max_depth=-1, context={})

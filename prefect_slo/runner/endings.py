"""How a call ends: with what its worker sent, or with the state and typed error that stand for what happened to it."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import InvalidStateError
from contextvars import Context
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from prefect.client.schemas.objects import State
from prefect.logging import get_logger
from prefect.results import ResultRecord  # type: ignore[attr-defined]
from prefect.states import Cancelled, Crashed, Failed, format_exception
from prefect.utilities.engine import link_state_to_task_run_result

from prefect_slo.control import events as control
from prefect_slo.errors import OutOfMemory, SloError, TaskTimedOut, Unpicklable, WorkerLost
from prefect_slo.plan import Record
from prefect_slo.runner import engine, program
from prefect_slo.runner.backends import protocol
from prefect_slo.runner.calls import Call, Raised, Returned, Several
from prefect_slo.runner.deposits import Deposits, KeptRecord
from prefect_slo.runner.measure import Measure
from prefect_slo.runner.write_behind import WriteBehind


class Endings:
    """Completes futures, and writes down what no engine has written down.

    Args:
        context: The flow's context: states need its result store, links its table of results.
        measure: Hears of failures.
        writer: Writes the records.
        deposits: Values of results that stay elsewhere.
    """

    def __init__(
        self,
        context: Context,
        measure: Measure,
        writer: WriteBehind,
        deposits: Deposits,
    ) -> None:
        self._context, self._measure, self._writer = context, measure, writer
        self._deposits = deposits

    def done(self, call: Call, report: protocol.ItemReport, record: Record | None) -> None:
        """A call has come back from its worker."""
        result = report.outcome.payload
        travelled = isinstance(result, bytes)
        if isinstance(result, BaseException):  # it never ran: something that it takes can't be had
            self.crashed(call, result)
            return
        if travelled:
            try:
                result = program.load_result(report.outcome)
            except Exception as error:
                lost = Unpicklable(call.stage, "result", f"{type(error).__name__}: {error}")
                self.crashed(call, lost)
                return
        if isinstance(result, Raised):
            self._measure.failed(call.stage)
            if record == "summary" and not result.recorded:
                self._writer.add(_ended(call, Crashed(message=_aborted(result.error)), report))
            call.future.set_exception(result.error)
            return
        if isinstance(result, Returned):
            state = self._context.run(engine.completed, result.value, call.task_run_id)
            if not self._stays(call, state):
                self._context.run(link_state_to_task_run_result, state, result.value)
        else:
            state = result
            if not self._stays(call, state) and travelled and state.is_completed():
                self._context.run(_link, state)
        if record == "summary":
            self._writer.add(_ended(call, state, report))
        if not state.is_completed():
            self._measure.failed(call.stage)
        elif state.name == "Cached":
            self._measure.came_from_cache(call.stage)
        call.future.set_result(state)

    def _stays(self, call: Call, state: State[Any]) -> bool:
        """Whether the value of a state stays elsewhere; Prefect then recognises it as soon as it has come."""
        if not isinstance(state.data, KeptRecord):
            return False
        hollow = state.model_copy(update={"data": None})  # a state that is let go of lets go of its value
        stage = call.stage  # the call has the state, and would hold on to itself

        def arrived(value: Any, usd: Decimal) -> None:  # in any thread
            self._measure.fetched(stage, usd)
            self._context.copy().run(link_state_to_task_run_result, hollow, value)

        origin = call.origin if not state.data.is_persisted else None
        self._deposits.add(state.data.deposit, call.stage, arrived, origin)
        return True

    def dropped(self, call: Call) -> None:
        """A call has not been started and never will be: as with stock runners, it has no task run."""
        call.future.cancel()
        call.future.set_running_or_notify_cancel()
        self._measure.failed(call.stage)

    def lost(
        self,
        call: Call,
        ending: control.Ending,
        attempts: int,
        *,
        loss: protocol.Lost | None,
        report: protocol.ItemReport | None,
    ) -> None:
        """A call was lost with its worker, or could not travel."""
        error = _error(call, ending, attempts, loss, report)
        if ending == "timeout":
            self._end(call, Failed(name="TimedOut", message=str(error), data=error), attempts)
        elif ending == "cancelled":
            self._end(call, Cancelled(message=str(error), data=error), attempts)
        else:
            self.crashed(call, error, attempts)

    def crashed(self, call: Call, error: BaseException, attempts: int = 1) -> None:
        """A call has ended without its engine's saying so."""
        self._end(call, Crashed(message=str(error), data=error), attempts)

    def broken(self, call: Call, error: BaseException) -> None:
        """A call ends because the runner failed, not its task. From any thread, and never raises."""
        if call.future.done():
            return
        state: State[Any] = Crashed(message=f"The SLO runner failed: {error}", data=error)
        self._record(call, state, 1)
        with contextlib.suppress(InvalidStateError):
            call.future.set_result(state)

    def _end(self, call: Call, state: State[Any], attempts: int) -> None:
        """Complete and record it at once: until then Prefect believes that it runs."""
        self._measure.failed(call.stage)
        self._record(call, state, attempts)
        call.future.set_result(state)

    def _record(self, call: Call, state: State[Any], attempts: int) -> None:
        context = self._context.copy()  # it may be entered by another thread
        try:
            context.run(engine.finish, state, call.task_run_id)
            context.run(engine.record, _ended(call, state, None, runs=attempts))
        except Exception:
            get_logger("slo").warning("The end of a task run could not be recorded.", exc_info=True)


def shares(report: protocol.ItemReport, together: tuple[int, ...]) -> list[protocol.ItemReport]:
    """What the report of some items that ran as one says of each: its own result, an equal share of the time."""
    if len(together) == 1:
        return [report]
    outcome, n = report.outcome, len(together)
    payloads: list[Any] = [outcome.payload] * n
    if not outcome.unpicklable:
        with contextlib.suppress(Exception):  # what does not unpickle is said of each item as it ends
            result = program.load_result(outcome) if isinstance(outcome.payload, bytes) else outcome.payload
            payloads = list(result.results) if isinstance(result, Several) else [result] * n
    share_s = (report.ended - report.started) / n
    return [
        protocol.ItemReport(
            item,
            replace(
                outcome,
                payload=payload,
                parts=(),
                failed=program.is_failure(payload) or bool(outcome.unpicklable and outcome.failed),
                read_s=outcome.read_s / n,
                write_s=outcome.write_s / n,
            ),
            report.started + i * share_s,
            report.started + (i + 1) * share_s,
        )
        for i, (item, payload) in enumerate(zip(together, payloads, strict=True))
    ]


def _error(
    call: Call,
    ending: control.Ending,
    attempts: int,
    loss: protocol.Lost | None,
    report: protocol.ItemReport | None,
) -> SloError:
    detail = loss.detail if loss is not None else ending
    match ending:
        case "memory" if loss is not None:
            return OutOfMemory(call.stage, loss.peak_mb, loss.limit_mb, attempts, detail, loss.on_batch)
        case "timeout" if call.task.timeout_seconds or loss is None:
            told = loss.detail if loss is not None else ""
            return TaskTimedOut(call.stage, float(call.task.timeout_seconds or 0), attempts, told)
        case "unpicklable":
            outcome = report.outcome if report is not None else protocol.Outcome(b"")
            return Unpicklable(call.stage, "argument" if outcome.failed else "result", outcome.unpicklable)
        case "start":
            return WorkerLost(call.stage, f"no worker started: {detail}", attempts)
        case _:
            return WorkerLost(call.stage, detail, attempts)


def _aborted(error: BaseException) -> str:
    """What Prefect says of a task run that raised more than an exception."""
    if isinstance(error, SystemExit):
        return "Execution was aborted by Python system exit call."
    return f"Execution was interrupted by an unexpected exception: {format_exception(error)}"


def _ended(call: Call, state: State[Any], report: protocol.ItemReport | None, *, runs: int = 1) -> engine.Ended:
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
        runs,
    )


def _link(state: State[Any]) -> None:
    """Let Prefect recognise the result where the flow passes it on: the link the engine made is in the worker."""
    if isinstance(state.data, ResultRecord):
        link_state_to_task_run_result(state, state.data.result)
    else:  # in result storage
        stored: Any = state
        link_state_to_task_run_result(state, stored.result(raise_on_failure=False, _sync=True))

"""Tasks on workers without Prefect: the engine runs here, in the flow's process, and only the function travels.

At level ``full`` Prefect's engine runs each call in place, with the task's function replaced by one that sends the real
one out: states, retries, caching, hooks, timeouts and logs are what they always are. Below, a whole bundle goes out at
once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextvars import Context, ContextVar
from dataclasses import dataclass
from typing import Any

import cloudpickle
from prefect import Task
from prefect.exceptions import Pause

from prefect_slo.declaration import batched_names, function_of, undeclared, with_function
from prefect_slo.errors import SloError
from prefect_slo.plan import Record
from prefect_slo.runner import engine, program
from prefect_slo.runner.arguments import Parts, dump_arguments
from prefect_slo.runner.backends.protocol import (
    Carried,
    Carry,
    ItemReport,
    NotSent,
    Outcome,
    Overran,
    WorkerGone,
)
from prefect_slo.runner.calls import Payload, Raised, Returned, Several
from prefect_slo.runner.elsewhere import Elsewhere, deposited
from prefect_slo.runner.payloads import by_value
from prefect_slo.units import text

Work = tuple[Context, tuple[Task[Any, Any], list[Payload], Record]]


@dataclass(frozen=True)
class FunctionProgram:
    """Runs calls of one task with its function elsewhere; see ``HostedProgram``.

    Attributes:
        function: The task's function, pickled so that it loads where neither Prefect nor the user's modules are.
    """

    function: bytes

    @classmethod
    def of(cls, task: Task[Any, Any]) -> FunctionProgram:
        """The program of a task.

        Raises:
            NotSent: It is a generator, which yields into the flow.
            Exception: Whatever pickling its function raises.
        """
        if task.isgenerator:
            raise NotSent(f"task {task.name!r} is a generator: it yields where its flow runs")
        with by_value():
            return cls(bytes(cloudpickle.dumps(undeclared(function_of(task)))))

    def host(self, items: Sequence[tuple[int, Work]], carry: Carry, report: Callable[[ItemReport], None]) -> None:
        """Run calls in order; those that need no engine go out together."""
        parts = Parts()
        together = _arguments(items, parts)
        if together is None:
            self._apart(items, carry, report)
            return
        started = time.monotonic()
        try:
            answers = carry(self.function, together, parts=parts.all)
        except NotSent:  # too large together; one of them may be too large alone, and says so
            self._apart(items, carry, report)
            return
        except SloError as error:  # it was refused, and will be again: every call has failed
            refused = Carried(error, True, "", 0.0, 0.0, started, time.monotonic())
            answers = [refused] * len(items)
        for (item, work), carried in zip(items, answers, strict=True):
            context, (task, [call], _) = work
            outcome = context.run(_outcome, carried, task, call)
            report(ItemReport(item, outcome, carried.started, carried.ended))

    def _apart(self, items: Sequence[tuple[int, Work]], carry: Carry, report: Callable[[ItemReport], None]) -> None:
        """Run calls one by one."""
        for item, work in items:
            report(self._one(item, work, carry))

    def _one(self, item: int, work: Work, carry: Carry) -> ItemReport:
        """Run a call, or a batch of calls, by the engine here."""
        context, (task, calls, record) = work
        seen = _Seen()
        sent = with_function(task, self._sender(task, item, carry, seen))
        sent.timeout_seconds = None  # enforced where the function runs: a thread that waits for it can't be interrupted
        started = time.monotonic()
        try:
            result = context.run(_run, seen, sent, calls, record)
        except BaseException as error:  # a context that is entered already, say
            result = Raised(error)
        ended = time.monotonic()
        for one in result.results if isinstance(result, Several) else [result]:
            if isinstance(one, Raised) and isinstance(one.error, _Interrupted):
                outcome = one.error.outcome()
                return ItemReport(item, outcome, started, ended)
        outcome = Outcome(deposited(result), program.is_failure(result), "", seen.read_s, seen.write_s)
        return ItemReport(item, outcome, started, ended)

    def _sender(self, task: Task[Any, Any], item: int, carry: Carry, seen: _Seen) -> Callable[..., Any]:
        """What the engine calls in place of the task's function."""

        def send(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            try:
                parts = Parts()
                sent = [(item, dump_arguments(args, kwargs, parts))]
                [carried] = carry(self.function, sent, limit_s=task.timeout_seconds, parts=parts.all)
            except Overran as error:
                raise TimeoutError(str(error)) from None
            except (NotSent, WorkerGone) as error:
                seen.left = True
                raise _Interrupted(error) from None
            seen.read_s, seen.write_s = seen.read_s + carried.read_s, seen.write_s + carried.write_s
            if carried.unpicklable:
                seen.left = True
                raise _Interrupted(_Stuck(carried.unpicklable, ran=not carried.failed))
            if carried.failed:
                raise carried.value
            return carried.value if carried.kept is None else Elsewhere(carried.kept)

        def sync(*args: Any, **kwargs: Any) -> Any:
            return send(args, kwargs)

        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            return await asyncio.to_thread(send, args, kwargs)

        return coroutine if task.isasync else sync


@dataclass
class _Seen:
    """What pickling took on the worker, over all attempts of a call; and whether that has left the engine."""

    read_s: float = 0.0
    write_s: float = 0.0
    left: bool = False


_SEEN: ContextVar[_Seen | None] = ContextVar("prefect_slo_hosted", default=None)


def _run(seen: _Seen, task: Task[Any, Any], calls: list[Payload], record: Record) -> program.Result:
    token = _SEEN.set(seen)
    try:
        return program.run_calls(task, calls, record)
    finally:
        _SEEN.reset(token)


def _worth_saying(message: logging.LogRecord) -> bool:
    """Prefect would say as an error that a run which leaves the engine, to go on elsewhere, has finished running."""
    seen = _SEEN.get()
    return seen is None or not seen.left or not message.getMessage().startswith("Finished in state Running")


logging.getLogger("prefect.task_runs").addFilter(_worth_saying)


class _Stuck(Exception):
    """Arguments or a result that cannot travel."""

    def __init__(self, why: str, *, ran: bool) -> None:
        self.ran = ran
        super().__init__(text(why, "why"))


class _Interrupted(Pause):
    """Takes a call out of Prefect's engine without a state.

    The engine lets its own signals through as they are: the run isn't over, the scheduler may start it again elsewhere.
    """

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause

    def outcome(self) -> Outcome:
        """How a call ends that could not travel.

        Raises:
            WorkerGone: The worker was lost, which is the backend's to deal with.
        """
        if isinstance(self.cause, _Stuck):
            return Outcome(b"", not self.cause.ran, str(self.cause))
        if isinstance(self.cause, NotSent):
            return Outcome(b"", True, str(self.cause))
        raise self.cause


def _arguments(items: Sequence[tuple[int, Work]], parts: Parts) -> list[tuple[int, bytes]] | None:
    """Pickled arguments of calls that need no engine; ``None`` where one of them does, or can't be prepared."""
    arguments = []
    for item, (context, (task, calls, record)) in items:
        if record == "full" or batched_names(task):
            return None
        [call] = calls
        try:
            values = context.run(engine.resolved, call.parameters, call.wait_for) if call.resolve else call.parameters
            arguments.append((item, dump_arguments(*engine.args_kwargs(task, values), parts)))
        except Exception:  # said of this call alone, when the calls go out one by one
            return None
    return arguments


def _outcome(carried: Carried, task: Task[Any, Any], call: Payload) -> Outcome:
    """The outcome of a call that ran without the engine."""
    if carried.unpicklable:
        return Outcome(b"", carried.failed, carried.unpicklable)
    value: Any = Returned(carried.value if carried.kept is None else Elsewhere(carried.kept))
    if carried.failed:
        failed = isinstance(carried.value, Exception)
        value = engine.failed(carried.value, task, call.task_run_id) if failed else Raised(carried.value)
    return Outcome(deposited(value), carried.failed, "", carried.read_s, carried.write_s)

"""What a worker opens to run the calls of one stage of one flow run: Prefect's context, hydrated once, and the task.

In a worker process the context is rebuilt from bytes, without the parent's settings (they travel as environment
variables, with the API's address, so that no worker starts a server of its own), and once per worker and flow run:
rebuilding it costs 40-90 ms, a task run 2-3 ms.
"""

from __future__ import annotations

import asyncio
import copy
import pickle
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from contextvars import Context
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import cloudpickle
from prefect import Flow, Task
from prefect.blocks.core import Block
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, SyncClientContext, hydrated_context, serialize_context
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.dispatch import lookup_type

from prefect_slo.plan import Record
from prefect_slo.runner import batches, engine, relay, shelf, worker_state
from prefect_slo.runner.apart import dump_result, load_call, load_parts
from prefect_slo.runner.backends.protocol import Outcome, RunItem
from prefect_slo.runner.calls import ATOMS, Payload, Raised, Returned, Several
from prefect_slo.runner.exceptions import portable, raised_in

Result = State[Any] | Returned | Raised | Several


@dataclass(frozen=True)
class ThreadProgram:
    """Runs calls in the flow's own process, each in the context that it was submitted in.

    Attributes:
        inline: Whether submits from inside a call run in place: where workers are limited, one that waited for
            another could wait for itself.
    """

    inline: bool

    def open(self, emit: Callable[[bytes], None]) -> RunItem:
        return self._run

    def _run(self, item: int, payload: tuple[Context, tuple[Task[Any, Any], list[Payload], Record]]) -> Outcome:
        context, work = payload
        try:
            result = context.run(self._execute, *work)
        except BaseException as error:  # a context that is entered already, say
            result = Raised(error)
        return Outcome(result, failed=is_failure(result))

    def _execute(self, task: Task[Any, Any], calls: list[Payload], record: Record) -> Result:
        with worker_state.inline() if self.inline else nullcontext():
            return run_calls(task, calls, record)


@dataclass(frozen=True)
class ProcessProgram:
    """Runs calls of one task in a worker process.

    Attributes:
        run_key: Names the flow run: a worker holds the context of one at a time.
        context: The flow run's context, cloudpickled.
        task: The task, cloudpickled.
        apart: Whether values that may be large go beside their results, so that they can stay where they are made.
    """

    run_key: str
    context: bytes
    task: bytes
    apart: bool = False

    def open(self, emit: Callable[[bytes], None]) -> RunItem:
        worker_state.enter_worker()
        _HYDRATED.enter(self.run_key, self.context, emit)
        task: Task[Any, Any] = cloudpickle.loads(self.task)

        def run(item: int, payload: bytes | tuple[bytes, tuple[bytes, ...]]) -> Outcome:
            _HYDRATED.enter(self.run_key, self.context, emit)
            return _run_pickled(task, payload, _HYDRATED.loop(), apart=self.apart)

        return run


def dump_context(*, without_flow: bool = False) -> bytes:
    """The current flow run's context for ``ProcessProgram``, without settings.

    Args:
        without_flow: The flow goes by its name and options alone: its code, hooks and runner stay here, and with them
            whatever they refer to.

    Raises:
        Exception: Whatever pickling the flow or its parameters raises.
    """
    context = serialize_context()
    flow = context["flow_run_context"].get("flow")
    if without_flow and flow is not None:
        context["flow_run_context"]["flow"] = _hollow(flow)
    context["settings_context"] = {}
    context["tags_context"] = {}  # every call brings the tags that it was submitted under
    return bytes(cloudpickle.dumps(context))


def _hollow(flow: Flow[..., Any]) -> Flow[..., Any]:
    """A flow of the same name and options that does nothing."""
    hollow = copy.copy(flow)
    hollow.fn = _stays_at_home
    hollow.task_runner = ThreadPoolTaskRunner()  # type: ignore[assignment]
    for hooks in [name for name in vars(hollow) if name.endswith("_hooks")]:
        setattr(hollow, hooks, [])
    for name in ("__wrapped__", "_storage", "parameters"):
        hollow.__dict__.pop(name, None)
    return hollow


def _stays_at_home(*_: Any, **__: Any) -> None:
    """Stands for the function of a flow whose tasks run elsewhere."""


def dump(
    calls: list[Payload],
    record: Record,
    kept: Mapping[int, str] = MappingProxyType({}),
    how: AbstractContextManager[None] | None = None,
    leave: Callable[[Any], bytes] | None = None,
) -> bytes:
    """The payload of some calls for a worker process.

    Args:
        calls: The calls.
        record: Their record level.
        kept: Names of files that stand for results among their arguments, by ``id``.
        how: Entered where the user's own objects have to be pickled.
        leave: Pickles those where results may lie at the worker's own place.

    Raises:
        Exception: Whatever pickling the arguments raises.
    """
    plain = all(not call.resolve and _PLAIN.issuperset(map(type, call.parameters.values())) for call in calls)
    content = (
        [(c.task_run_id, c.parameters, c.wait_for, c.dependencies, c.tags, c.resolve, c.cancelled) for c in calls],
        record,
    )
    if kept:
        return shelf.dump(content, kept)
    if plain:
        return pickle.dumps(content)
    with how or nullcontext():
        return leave(content) if leave is not None else bytes(cloudpickle.dumps(content))


def load_result(outcome: Outcome) -> Result:
    """What a worker process made of a call.

    Raises:
        Exception: Whatever unpickling the result raises.
    """
    result: Result = load_parts(outcome.payload, outcome.parts)
    return result


_PLAIN = frozenset(ATOMS)
"""Arguments that need nothing of cloudpickle, which takes ten times as long to set up."""


class _Hydrated:
    """The flow run whose context this worker process holds."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._stack = ExitStack()
        self._runner: asyncio.Runner | None = None

    def enter(self, key: str, context: bytes, emit: Callable[[bytes], None]) -> None:
        """Hold the context of that flow run; costs nothing when it is held already."""
        relay.send_through(emit)
        if key == self._key:
            return
        self._stack.close()
        self._key, self._stack = None, ExitStack()
        client = self._stack.enter_context(SyncClientContext.get_or_create()).client
        self._stack.enter_context(hydrated_context(_with_blocks(cloudpickle.loads(context)), client=client))
        self._key = key

    def loop(self) -> asyncio.Runner:
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner


_HYDRATED = _Hydrated()


def _with_blocks(context: dict[str, Any]) -> dict[str, Any]:
    """A context whose result storage is a block already, where its type is known here.

    To look a type up, Prefect imports every integration that is installed, which takes longer than all the rest.
    """
    store = context["flow_run_context"].get("result_store", {})
    for name, fields in store.items():
        if isinstance(fields, dict) and "block_type_slug" in fields:
            plain = dict(fields)
            with suppress(KeyError):
                store[name] = lookup_type(Block, plain.pop("block_type_slug"))(**plain)
    return context


def run_calls(task: Task[Any, Any], calls: list[Payload], record: Record, loop: asyncio.Runner | None = None) -> Result:
    """Run a call, or some that make a batch, at a record level."""
    if len(calls) > 1:
        return Several(batches.run(task, calls, loop))
    if record == "full":
        return engine.run_full(task, calls[0], runner=loop)
    return engine.run_bare(task, calls[0], runner=loop)


def _run_pickled(
    task: Task[Any, Any],
    payload: bytes | tuple[bytes, tuple[bytes, ...]],
    loop: asyncio.Runner,
    *,
    apart: bool = False,
) -> Outcome:
    begun = time.perf_counter()
    try:
        (content, record), mapped = shelf.load(payload) if isinstance(payload, bytes) else load_call(*payload)
        calls = [Payload(*call) for call in content]
    except Exception as error:
        return Outcome(b"", failed=True, unpicklable=f"{type(error).__name__}: {error}")
    read = time.perf_counter()
    with engine.under_tags(calls[0].tags):
        result = run_calls(task, calls, record, loop)
    _forget_results()
    ran = time.perf_counter()
    failed = is_failure(result)
    if failed:
        result = portable_result(result)
    try:
        dumped, parts = dump_result(result) if apart else (cloudpickle.dumps(result), ())
        if failed:
            pickle.loads(dumped)  # a failed state may hold anything
    except Exception as error:
        if not failed:
            return Outcome(b"", unpicklable=f"{type(error).__name__}: {error}")
        dumped, parts = cloudpickle.dumps(_plain(result)), ()
    wrote_s = time.perf_counter() - ran
    return Outcome(dumped, failed=failed, read_s=read - begun, write_s=wrote_s, parts=parts, mapped=mapped)


def is_failure(result: Any) -> bool:
    """Whether a result, or any of several, is not a success."""
    if isinstance(result, Several):
        return any(is_failure(one) for one in result.results)
    return isinstance(result, Raised) or (isinstance(result, State) and not result.is_completed())


def portable_result(result: Result) -> Result:
    """A result whose exceptions travel, be it as plain ones of the same words."""
    if isinstance(result, Several):
        return Several([portable_result(one) for one in result.results])  # type: ignore[misc]
    if isinstance(result, Raised):
        return replace(result, error=portable(result.error))
    if not isinstance(result, State) or not is_failure(result):
        return result
    raised = raised_in(result)
    if raised is None or portable(raised) is raised:
        return result
    return _plain(result)


def _plain(result: Result) -> Result:
    """A result whose failed states hold their words alone."""
    if isinstance(result, Several):
        return Several([_plain(one) for one in result.results])  # type: ignore[misc]
    if not isinstance(result, State) or not is_failure(result):
        return result
    error = RuntimeError(result.message or "the task failed with an exception that cannot be pickled")
    return result.model_copy(update={"data": error, "timestamp": result.timestamp})


def _forget_results() -> None:
    """Drop the engine's links from results to task runs: in a worker nothing looks them up, and they would pile up."""
    context = FlowRunContext.get()
    if context is not None:
        context.run_results.clear()

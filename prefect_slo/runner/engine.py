"""Running one call: by Prefect's task engine (level ``full``), or bare with one record at the end, or bare with none.

``full`` gives whatever Prefect gives: states, retries, caching, timeouts, hooks, logs. ``summary`` and ``bare`` call
the task's function and are only for tasks that ask for none of these (``eligible``); at ``summary`` the flow's process
then emits a single terminal event that carries the measured start and end (``record``).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any
from uuid import UUID

from prefect import Task, tags
from prefect.client.schemas.objects import RunInput, State, StateDetails, TaskRun
from prefect.context import FlowRunContext, TagsContext, TaskRunContext
from prefect.logging import get_run_logger
from prefect.results import ResultRecord, ResultRecordMetadata  # type: ignore[attr-defined]
from prefect.states import Completed, Failed, Pending, format_exception
from prefect.task_engine import (  # type: ignore[attr-defined]
    _create_task_run_locally,
    return_value_to_state_sync,
    run_task_async,
    run_task_sync,
)
from prefect.utilities.callables import parameters_to_args_kwargs
from prefect.utilities.collections import visit_collection
from prefect.utilities.engine import emit_task_run_state_change_event, resolve_to_final_result

from prefect_slo.runner.calls import Payload, Raised, Returned


def eligible(task: Task[Any, Any], *, persisted: bool, tagged: bool) -> bool:
    """Whether a task asks for nothing that levels ``summary`` and ``bare`` leave out.

    Args:
        task: The task.
        persisted: Whether its results are persisted, by itself or by default.
        tagged: Whether tags are in force (a tag may carry a concurrency limit, which the engine enforces).
    """
    hooks = (
        task.on_completion_hooks
        + task.on_failure_hooks
        + task.on_running_hooks
        + task.on_rollback_hooks
        + task.on_commit_hooks
    )
    policy = (task.retries, task.timeout_seconds, task.cache_expiration, task.cache_key_fn, task.result_storage_key)
    return not (
        any(policy)
        or task.task_run_name
        or hooks
        or persisted
        or tagged
        or task.tags
        or task.isgenerator
        or task.log_prints
    )


_CANCELLED = threading.Event()
_CANCELLED.set()


def run_full(task: Task[Any, Any], call: Payload, *, runner: asyncio.Runner | None = None) -> State[Any] | Raised:
    """Run a call by Prefect's task engine, to its final state."""
    wanted: dict[str, Any] = {
        "task": task,
        "task_run_id": call.task_run_id,
        "parameters": call.parameters,
        "wait_for": call.wait_for,
        "dependencies": call.dependencies,
        "return_type": "state",
        "context": {"cancel_event": _CANCELLED} if call.cancelled else None,
    }
    try:
        state = run_async(run_task_async(**wanted), runner) if task.isasync else run_task_sync(**wanted)
    except BaseException as error:  # the engine re-raises what is not the task's own failure: it belongs to the caller
        return Raised(error)
    return state  # type: ignore[return-value]


def run_bare(
    task: Task[Any, Any], call: Payload, *, runner: asyncio.Runner | None = None
) -> State[Any] | Returned | Raised:
    """Call the task's function and nothing else; the flow's process writes down what is written down.

    A value comes back as it is (``Returned``). A failure comes back as Prefect's failed state, and where an upstream
    failed, Prefect's engine says so (``run_full``), so that both look the same at every level.
    """
    if call.cancelled:
        return run_full(task, call, runner=runner)
    values = call.parameters
    if call.resolve:
        try:
            values = resolved(call.parameters, call.wait_for)
        except BaseException:  # an upstream that ended by SystemExit, say
            return run_full(task, call, runner=runner)
    try:
        with _inside(task, call.task_run_id, values):
            return Returned(_call(task, values, runner))
    except Exception as error:
        return failed(error, task, call.task_run_id)
    except BaseException as error:
        return Raised(error, recorded=False)


def _inside(task: Task[Any, Any], task_run_id: UUID, values: dict[str, Any]) -> AbstractContextManager[Any]:
    """The context of a task run, as task code and what it calls expect it: a nested task run then names its parent."""
    flow = FlowRunContext.get()
    if flow is None or flow.flow_run is None:
        return nullcontext()
    own = {"id": task_run_id, "flow_run_id": flow.flow_run.id, "name": task.name, "task_key": task.task_key}
    task_run = _blank().task_run.model_copy(update=own)
    return _blank().model_copy(
        update={
            "task": task,
            "task_run": task_run,
            "parameters": values,
            "result_store": flow.result_store,
            "start_time": datetime.now(UTC),
        }
    )


@cache
def _blank() -> TaskRunContext:
    """To copy from: making one anew takes a hundred times as long."""
    task_run = TaskRun.model_construct(name="", task_key="", dynamic_key="", run_count=1)
    return TaskRunContext.model_construct(task=None, task_run=task_run, parameters={}, persist_result=False)


def completed(value: Any, task_run_id: UUID, flow_run_id: UUID | None = None) -> State[Any]:
    """The final state of a call that returned ``value``; a returned state is taken as Prefect takes it."""
    context = FlowRunContext.get()
    if isinstance(value, State) and context is not None:
        state = return_value_to_state_sync(value, result_store=context.result_store)
    else:
        data: Any = value
        if not isinstance(value, ResultRecord):
            data = ResultRecord.model_construct(metadata=_METADATA, result=value)
        state = Completed(data=data)
    if flow_run_id is None and context is not None and context.flow_run is not None:
        flow_run_id = context.flow_run.id
    return finish(state, task_run_id, flow_run_id)


@dataclass(frozen=True, slots=True)
class Ended:
    """A call that ended outside Prefect's engine, with what its record needs.

    Attributes:
        task: The task.
        task_run_id: Its id.
        state: Its final state.
        names: Names of its parameters.
        dependencies: Upstream runs by parameter name.
        wait_for: What it waited for.
        tags: Tags at submission.
        started: When it started, or ``None`` where it never did.
        elapsed_s: How long it ran.
        runs: How often it was started.
    """

    task: Task[Any, Any]
    task_run_id: UUID
    state: State[Any]
    names: tuple[str, ...]
    dependencies: dict[str, set[RunInput]] | None
    wait_for: list[Any] | None
    tags: frozenset[str]
    started: datetime | None = None
    elapsed_s: float = 0.0
    runs: int = 1


def record(ended: Ended) -> None:
    """Emit one terminal event whose task run carries the measured start and end."""
    with under_tags(ended.tags - frozenset(TagsContext.get().current_tags)):
        task_run = _create_task_run_locally(
            ended.task,
            id=ended.task_run_id,
            parameters=dict.fromkeys(ended.names),
            wait_for=ended.wait_for,
            extra_task_inputs={k: v for k, v in (ended.dependencies or {}).items() if k in ended.names} or None,
        )
    took = timedelta(seconds=ended.elapsed_s)
    when = ended.started + took if ended.started is not None else ended.state.timestamp
    state = finish(ended.state.model_copy(update={"timestamp": when}), ended.task_run_id)
    begun: State[Any] = Pending()
    if ended.started is not None:
        task_run.start_time, task_run.end_time = ended.started, state.timestamp  # type: ignore[assignment]
        task_run.expected_start_time = ended.started  # type: ignore[assignment]
        task_run.total_run_time = took
    task_run.run_count = ended.runs
    task_run.state, task_run.state_type, task_run.state_name = state, state.type, state.name
    emit_task_run_state_change_event(task_run=task_run, initial_state=begun, validated_state=state)


_METADATA = ResultRecordMetadata()


def run_async(coroutine: Coroutine[Any, Any, Any], runner: asyncio.Runner | None) -> Any:
    """Run a coroutine to its end, in the current context: a runner left to itself keeps that of its first call."""
    return asyncio.run(coroutine) if runner is None else runner.run(coroutine, context=copy_context())


def args_kwargs(task: Task[Any, Any], values: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a task's function from values by parameter name."""
    args, kwargs = parameters_to_args_kwargs(task.fn, values)
    return tuple(args), kwargs


def _call(task: Task[Any, Any], values: dict[str, Any], runner: asyncio.Runner | None) -> Any:
    args, kwargs = args_kwargs(task, values)
    if not task.isasync:
        return task.fn(*args, **kwargs)
    coroutine = task.fn(*args, **kwargs)
    return run_async(coroutine, runner)


def resolved(parameters: dict[str, Any], wait_for: list[Any] | None) -> dict[str, Any]:
    """Arguments with states replaced by their results.

    Raises:
        UpstreamTaskError: An upstream did not complete.
    """
    for upstream in wait_for or ():
        visit_collection(
            upstream, resolve_to_final_result, return_data=False, max_depth=-1, remove_annotations=True, context={}
        )
    return {
        name: visit_collection(
            value,
            resolve_to_final_result,
            return_data=True,
            max_depth=-1,
            remove_annotations=True,
            context={"parameter_name": name},
        )
        for name, value in parameters.items()
    }


def failed(error: Exception, task: Task[Any, Any], task_run_id: UUID | None) -> State[Any]:
    """The state of a call whose function raised."""
    if (context := FlowRunContext.get()) is not None:
        get_run_logger(context).error("Task %r failed with exception: %r", task.name, error, exc_info=True)
    return finish(
        Failed(data=error, message=f"Task run encountered an exception {format_exception(error)}"), task_run_id
    )


def finish(state: State[Any], task_run_id: UUID | None, flow_run_id: UUID | None = None) -> State[Any]:
    """Say in a state whose it is, as Prefect's engine does."""
    if flow_run_id is None:
        context = FlowRunContext.get()
        flow_run_id = context.flow_run.id if context is not None and context.flow_run is not None else None
    state.state_details = StateDetails.model_construct(
        **{**StateDetails().__dict__, "task_run_id": task_run_id, "flow_run_id": flow_run_id}
    )
    return state


def under_tags(names: frozenset[str]) -> ExitStack:
    """A context in which exactly these tags are in force on top of the flow run's own."""
    stack = ExitStack()
    if names:
        stack.enter_context(tags(*names))
    return stack

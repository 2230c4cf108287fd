"""Timings of flows that ran before they were decorated, from Prefect's own records, with no re-run.

What Prefect's fields do and do not say:

- ``end_time − start_time`` of a task run contains the waits between retries, and ``total_run_time`` is not reliable for
  retried or timed-out runs; so runs of several attempts are timed by their states, each Running span by itself.
- ``expected_start_time`` is when a worker picked the call up. The time of submission is in the task-run id where that
  is a version 7 UUID (thread and process runners).
- Runs that are ``Cached`` or ``NotReady`` did no work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType, TaskRun
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort

from prefect_slo.errors import UnknownFlow
from prefect_slo.history.timing import Call, call_of, most_at_once, submission
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.resources import Size
from prefect_slo.runner.graph import StageGraph
from prefect_slo.telemetry.api import api_client
from prefect_slo.telemetry.fold import fold
from prefect_slo.telemetry.learned import workflow_of
from prefect_slo.telemetry.ledger import Ledger
from prefect_slo.telemetry.records import RunRecord, StageKey, StageRecord, Status
from prefect_slo.units import whole
from prefect_slo.workflow import Workflow

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.orchestration import SyncPrefectClient

PAGE = 200
NOMINAL_VCPUS, NOMINAL_MEMORY_MB, UNKNOWN = 1.0, 1024, "unknown"
_SEVERITY: Sequence[Status] = ("completed", "cached", "cancelled", "timed_out", "failed", "crashed")


@dataclass(frozen=True)
class History:
    """What Prefect's records say about a flow.

    Attributes:
        records: Runs, oldest first; ``telemetry.store.publish`` makes them part of what the flow's profile learns from.
        workflow: The stage graph.
        stage_runs: Rows of completed stage runs of completed runs.
        run_latency_s: Latency by run id.
        task_runs: How many task runs were read.
        left_out: How many of them say nothing about time: never ready, or nested in another task.
    """

    records: tuple[RunRecord, ...]
    workflow: Workflow
    stage_runs: StageRuns
    run_latency_s: Mapping[str, float]
    task_runs: int
    left_out: int


def import_history(
    flow_name: str,
    limit: int = 50,
    *,
    hardware: str = UNKNOWN,
    vcpus: float = NOMINAL_VCPUS,
    memory_mb: int = NOMINAL_MEMORY_MB,
    client: SyncPrefectClient | None = None,
) -> History:
    """Stage runs of the newest completed runs of a flow, whatever task runner they used.

    Workers are counted as the most calls of a stage that ran at once. What size they had is not recorded: where you
    don't say it, rows carry a nominal 1 vCPU and 1,024 MB, and a hardware name that keeps them apart from measured
    ones. Rows whose hardware and vCPUs are on the menu of a stage count for its model as measured ones do.

    Args:
        flow_name: Name of the flow.
        limit: Runs to read at most.
        hardware: What the workers ran on, where all of them did: ``thread`` for Prefect's default task runner, ``cpu``
            for processes, or any name of a menu.
        vcpus: vCPUs that each worker had.
        memory_mb: Memory that each worker had.
        client: Client to read with; one is made when missing.

    Raises:
        UnknownFlow: The API has no completed run of that flow with a task run in it.
        InvalidValue: A limit below 1, or a size that can't be.
    """
    whole(limit, "limit")
    size = Size(vcpus, memory_mb, hardware=hardware)
    records, read, left_out = [], 0, 0
    with ExitStack() as stack:
        api = client or stack.enter_context(api_client())
        for flow_run in _flow_runs(api, flow_name, limit):
            task_runs = _task_runs(api, flow_run.id)
            record, used = _record(api, flow_name, flow_run, task_runs, size)
            read, left_out = read + len(task_runs), left_out + len(task_runs) - used
            records += [record] if record.stages else []
    records.sort(key=lambda record: (record.started_at, record.run_id))
    workflow = workflow_of(Ledger().absorb(records), flow_name)
    if workflow is None:
        hint = "Check the flow's name (prefect flow ls), or run it once."
        raise UnknownFlow(flow_name, hint)
    folded = fold(records)
    return History(tuple(records), workflow, folded.stage_runs, folded.run_latency_s, read, left_out)


def _flow_runs(api: SyncPrefectClient, flow_name: str, limit: int) -> list[FlowRun]:
    runs: list[FlowRun] = []
    while len(runs) < limit:
        page = api.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow_name])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.COMPLETED]))
            ),
            sort=FlowRunSort.START_TIME_DESC,
            limit=min(PAGE, limit - len(runs)),
            offset=len(runs),
        )
        if not page:
            break
        runs += page
    return runs


def _task_runs(api: SyncPrefectClient, flow_run_id: UUID) -> list[TaskRun]:
    runs: list[TaskRun] = []
    while True:
        page = api.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])),
            sort=TaskRunSort.EXPECTED_START_TIME_ASC,
            limit=PAGE,
            offset=len(runs),
        )
        runs += page
        if len(page) < PAGE:
            return runs


def _record(
    api: SyncPrefectClient, flow_name: str, flow_run: FlowRun, task_runs: list[TaskRun], size: Size
) -> tuple[RunRecord, int]:
    """The run as a record, and how many of its task runs say something about time."""
    graph, stage_of = StageGraph(), dict[UUID, str]()
    names = _task_names(task_runs)
    calls: dict[str, list[Call]] = {}
    ended: dict[UUID, float] = {}
    ready: dict[str, list[float]] = {}
    for run in _parents_first([run for run in task_runs if _at_top(run)]):
        upstream = [parent for parent in _upstream(run) if parent in stage_of]
        task = cast("Task[Any, Any]", SimpleNamespace(task_key=run.task_key, name=names[run.task_key]))
        stage = stage_of[run.id] = graph.place(task, run.id, upstream)
        if (call := call_of(api, run)) is None:
            continue
        calls.setdefault(stage, []).append(call)
        ended[run.id] = call.ended
        ready.setdefault(stage, []).append(max([call.submitted, *(ended[p] for p in upstream if p in ended)]))
    stages = [
        _stage(str(flow_run.id), name, graph.key_of(name), calls[name], min(ready[name]), size)
        for name in graph.stages
        if name in calls
    ]
    started, finished = flow_run.start_time, flow_run.end_time
    once = started is not None and finished is not None and flow_run.run_count == 1
    workflow = graph.workflow(flow_name)
    record = RunRecord(
        flow=flow_name,
        run_id=str(flow_run.id),
        status="completed",
        latency_s=(finished - started).total_seconds() if once and started and finished else math.nan,
        started_at=started.timestamp() if started else math.nan,
        stages=tuple(stages),
        workflow=workflow.to_document() if workflow else None,
        source="history",
    )
    return record, sum(len(of_stage) for of_stage in calls.values() if of_stage)


def _stage(run_id: str, name: str, code: tuple[str, str], calls: list[Call], ready: float, size: Size) -> StageRecord:
    spans = [span for call in calls for span in call.spans]
    wall = max([call.ended for call in calls]) - ready
    workers = most_at_once(spans)
    busy = sum(end - start for start, end in spans) / workers
    row = StageRun(
        run_id=run_id,
        stage=name,
        workers=workers,
        memory_mb=size.memory_mb,
        vcpus=size.vcpus,
        wall_s=max(wall, 1e-6),
        overhead_s=max(0.0, wall - busy),
        compute_s=busy,
        items=len(calls),
        hardware=size.kind,
        started_at=ready,
    )
    status = max((call.status for call in calls), key=_SEVERITY.index)
    return StageRecord(row, StageKey(*code, size.kind), status)


def _at_top(run: TaskRun) -> bool:
    """Whether it was called from the flow, not from within another task, whose time contains it."""
    return not run.task_inputs.get("__parents__")


def _upstream(run: TaskRun) -> list[UUID]:
    sources = (source for sources in run.task_inputs.values() for source in sources)
    return list(dict.fromkeys(source.id for source in sources if source.input_type == "task_run"))


def _parents_first(runs: list[TaskRun]) -> Iterable[TaskRun]:
    by_id = {run.id: run for run in sorted(runs, key=lambda run: (submission(run), str(run.id)))}
    sorter = TopologicalSorter({id: [p for p in _upstream(run) if p in by_id] for id, run in by_id.items()})
    try:
        return [by_id[id] for id in sorter.static_order()]
    except CycleError:  # task runs that the server recorded with each other as inputs: their order of submission holds
        return list(by_id.values())


def _task_names(runs: list[TaskRun]) -> dict[str, str]:
    """Name of each task: its runs' common name less Prefect's suffix, or its key where runs have names of their own."""
    named: dict[str, set[str]] = {}
    for run in runs:
        match = re.fullmatch(r"(.+)-[0-9a-f]{3}", run.name)
        named.setdefault(run.task_key, set()).add(match[1] if match else "")
    return {
        key: next(iter(names)) if len(names) == 1 and names != {""} else key.rpartition("-")[0] or key
        for key, names in named.items()
    }

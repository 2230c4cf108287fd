"""Runs flows with different task runners and reads from the API what each has left there."""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import UUID

import pytest
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import Log, State, TaskRun
from prefect.settings import (
    PREFECT_LOGGING_LEVEL,
    PREFECT_LOGGING_TO_API_BATCH_INTERVAL,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_slo import BatchJobs, BatchPool, WorkPool, slo
from prefect_slo.loop.director import Following, following
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import Size
from prefect_slo.runner.cluster_pools import DaskPool, RayPool
from prefect_slo.runner.recipe import ObservedRun, Recipe
from prefect_slo.runner.task_runner import SLOTaskRunner
from prefect_slo.testing.aws import LocalAws, local_aws

RUNNERS: dict[str, Callable[[], Any]] = {
    "stock": ThreadPoolTaskRunner,
    "thread": lambda: SLOTaskRunner(isolation="thread", record="full"),
    "process": lambda: SLOTaskRunner(isolation="process", record="full"),
    "auto": lambda: SLOTaskRunner(record="full"),
}
SETTLE_S = 180.0
AT_ONCE = 3  # flows wait for the server most of the time
UNCOMPARED = ("View at", "running in a worker thread", "is submitted inside a transaction")
"""Logs that differ rightly: where to look at a run, that a thread's timeout interrupts nothing, where a stage runs."""


@dataclass
class Seen:
    """What one run of a flow has shown; run names and ids, which differ from run to run, are taken out.

    Attributes:
        outcome: The returned value, or the type and message of what was raised.
        flow_state: Type, name and message of the final state.
        tasks: One entry per task run.
        logs: Level, message, and whether a task said it.
    """

    outcome: Any
    flow_run_id: UUID
    flow_state: tuple[str, str, str] = ("", "", "")
    tasks: list[dict[str, Any]] = field(default_factory=list)
    logs: list[tuple[int, str, bool]] = field(default_factory=list)


def run(flow: Flow[..., Any], way: str, pools: Mapping[str, Any]) -> Seen:
    """Run a flow to its end, whatever that is: with a task runner, ``decorated``, ``planned`` as well, or on a pool."""
    if way == "planned":
        return _run(_decorated(flow), following(Following(plan=_plan(flow))))
    if way == "decorated":
        return _run(_decorated(flow))
    if way in pools:
        return _run(
            flow.with_options(task_runner=SLOTaskRunner(record="full", pools=[pools[way]], pool=pools[way].name))
        )
    return _run(flow.with_options(task_runner=RUNNERS[way]()))


def _run(flow: Flow[..., Any], within: AbstractContextManager[None] | None = None) -> Seen:
    ids: list[UUID] = []
    named = flow.with_options(on_running=[*flow.on_running_hooks, lambda _f, run, _s: ids.append(run.id)])
    try:
        with within or nullcontext():
            value = named()
            if flow.isasync:
                value = asyncio.run(value)
        outcome = ("returned", plain(value))
    except Exception as error:
        if not ids:
            raise  # it has never run: that is no outcome to compare
        outcome = ("raised", type(error).__name__, unnamed(str(error)))
    return Seen(outcome, ids[0])


def _decorated(flow: Flow[..., Any]) -> Flow[..., Any]:
    return slo(latency="1h", explore=0)(flow)


def _plan(flow: Flow[..., Any]) -> Plan:
    """A plan of worker processes for the stages that a run of the flow shows."""
    shown: list[ObservedRun] = []
    _run(_decorated(flow), following(Following(recipe=Recipe(isolation="thread"), heard=shown.append)))
    stages = shown[0].workflow.stages if shown and shown[0].workflow else ()
    choice = StagePlan(workers=2, size=Size(1, 1024), pool="process", record="full")
    return Plan(flow.name, None, {stage.name: choice for stage in stages})


def read_all(runs: dict[Any, Seen]) -> dict[Any, Seen]:
    """What the API knows of runs once it has taken everything in: until two looks agree."""
    deadline = time.monotonic() + SETTLE_S
    with get_client(sync_client=True) as client:
        before: dict[Any, Seen] = {}
        while True:
            after = _look(client, runs)
            settled = all(task["state"][1] not in ("Pending", "Running") for s in after.values() for task in s.tasks)
            if after == before and settled:
                return after
            assert time.monotonic() < deadline, f"the server has not taken everything in after {SETTLE_S:g} s"
            before = after
            time.sleep(2.0)  # the server takes events and logs in behind the run


def _look(client: SyncPrefectClient, runs: dict[Any, Seen]) -> dict[Any, Seen]:
    """What the API knows of runs now."""
    ids = [seen.flow_run_id for seen in runs.values()]
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=ids))
    flow_runs = {run.id: run for run in _pages(client.read_flow_runs, flow_run_filter=chosen)}
    task_runs, logs = defaultdict(list), defaultdict(list)
    for task_run in _pages(client.read_task_runs, flow_run_filter=chosen):
        task_runs[task_run.flow_run_id].append(task_run)
    for log in _pages(client.read_logs, log_filter=LogFilter(flow_run_id=LogFilterFlowRunId(any_=ids))):
        logs[log.flow_run_id].append(log)
    return {
        key: _seen(seen, flow_runs[seen.flow_run_id].state, task_runs[seen.flow_run_id], logs[seen.flow_run_id])
        for key, seen in runs.items()
    }


def _pages(read: Callable[..., list[Any]], **filters: Any) -> Iterator[Any]:
    for page in count():
        found = read(**filters, limit=200, offset=200 * page)
        yield from found
        if len(found) < 200:
            return


def _seen(run: Seen, state: State[Any], task_runs: list[TaskRun], logs: list[Log]) -> Seen:
    base = {task_run.id: _base(task_run.name) for task_run in task_runs}
    tasks = [
        {
            "name": base[task_run.id],
            "key": task_run.task_key,
            "state": (task_run.state_type and task_run.state_type.value, task_run.state_name),
            "runs": task_run.run_count,
            "tags": sorted(task_run.tags),
            "edges": {
                name: sorted(base.get(getattr(source, "id", None), str(source.input_type)) for source in sources)
                for name, sources in task_run.task_inputs.items()
            },
        }
        for task_run in task_runs
    ]
    said = [(log.level, unnamed(log.message), log.task_run_id is not None) for log in logs]
    return Seen(
        run.outcome,
        run.flow_run_id,
        (state.type.value, str(state.name), unnamed(state.message or "")),
        sorted(tasks, key=repr),
        sorted(log for log in said if not any(words in log[1] for words in UNCOMPARED)),
    )


def plain(value: Any) -> Any:
    """A result without what differs from run to run."""
    if isinstance(value, State):
        return value.type.value, value.name, unnamed(value.message or "")
    if isinstance(value, list | tuple):
        return type(value)(plain(part) for part in value)
    return value


def unnamed(text: str) -> str:
    """A message without what differs from run to run: ids, run names, times, addresses, lines of a traceback."""
    text = text.split("\nTraceback", 1)[0]
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "ID", text)
    text = re.sub(r"(Flow run|Subflow run|flow run) '[^']+'", r"\1 'NAME'", text)
    text = re.sub(r"(?<=\w)-[0-9a-f]{3}\b", "-XXX", text)
    text = re.sub(r"0x[0-9a-f]+", "0x", text)
    return re.sub(r"\d+(\.\d+)? second\(s\) from now", "N second(s) from now", text)


def _base(name: str) -> str:
    return re.sub(r"-[0-9a-f]{3}$", "", name)


@pytest.fixture(scope="session")
def logging_server(prefect_server: str) -> Iterator[str]:
    """The server, with logs sent to it."""
    settings = {
        PREFECT_LOGGING_LEVEL: "INFO",
        PREFECT_LOGGING_TO_API_ENABLED: True,
        PREFECT_LOGGING_TO_API_BATCH_INTERVAL: 0.1,
    }
    with temporary_settings(settings):
        yield prefect_server


@pytest.fixture(scope="module")
def run_all(
    logging_server: str, pools: dict[str, Any]
) -> Callable[[Iterable[tuple[Flow[..., Any], str]]], dict[tuple[str, str], Seen]]:
    """Runs flows, each in a way, a few at a time; what was seen, by the name of the flow and the way."""

    def everything(pairs: Iterable[tuple[Flow[..., Any], str]]) -> dict[tuple[str, str], Seen]:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            started = {
                (flow.fn.__name__, way): threads.submit(copy_context().run, run, flow, way, pools)
                for flow, way in pairs
            }
        return read_all({key: future.result() for key, future in started.items()})

    return everything


@pytest.fixture(scope="module")
def pools(ray: None, account: LocalAws, process_pool: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A pool of every kind beyond this machine, by its name."""
    process_pool("work pool", PREFECT_LOGGING_LEVEL="INFO", PREFECT_LOGGING_TO_API_ENABLED="true")
    jobs = BatchJobs(account.batch.queue(), "image", poll_s=(0.02, 0.1), gather_s=0.02, region="us-east-1")
    batch = BatchPool(jobs, account.bucket, concurrency=2)
    batch.jobs.deploy()
    mailboxes = tmp_path_factory.mktemp("mailboxes of flows")
    made = (
        DaskPool(concurrency=2),
        RayPool(concurrency=2),
        account.pool(memory_mb=(512,), concurrency=2),
        batch,
        WorkPool("work pool", sizes=(Size(1, 512),), storage=mailboxes, concurrency=1),
    )
    return {pool.name: pool for pool in made}


@pytest.fixture(scope="module")
def account() -> Iterator[LocalAws]:
    """Functions that really run and see what is installed here: the programs of these tests are of this package."""
    with local_aws(packages=None) as account:
        yield account


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A Ray cluster of two CPUs on this machine, which flows and backends find connected."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()

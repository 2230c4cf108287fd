"""Flows whose stages run in real work pools: what the API has of them, and what becomes of them when things break."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, FlowRunFilter, FlowRunFilterTags
from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from prefect_slo import SLOTaskRunner, WorkPool, slo_task
from prefect_slo.errors import WorkerLost, WorkPoolUnusable
from prefect_slo.pricing import price_list
from prefect_slo.resources import Size
from prefect_slo.runner.recipe import ObservedRun, Recipe
from prefect_slo.runner.work_pools import shut_offices
from prefect_slo.runner.workpool import watch

CPU, GPU = "flows-cpu", "flows-gpu"
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def pools(process_pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorkPool, WorkPool]]:
    """Two pools, each with a worker of its own."""
    storage = tmp_path_factory.mktemp("mailboxes")
    for name in (CPU, GPU):
        process_pool(name)
    made = tuple(WorkPool(name, (Size(0.5, 512),), storage, concurrency=1, idle_s=600) for name in (CPU, GPU))
    yield made  # type: ignore[misc]
    shut_offices()
    until(lambda: not list(storage.iterdir()), "mailboxes are left behind")


def until(holds: Callable[[], Any], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


@slo_task(pool=CPU)
@task
def halve(x: float) -> tuple[float, int, str]:
    return x / 2, os.getpid(), str(flow_run.get_id())


@slo_task(pool=GPU)
@task
def add(*halves: tuple[float, int, str]) -> tuple[float, int]:
    return sum(half for half, _, _ in halves), os.getpid()


@flow
def sums(n: int) -> tuple[UUID, float, set[int], set[str]]:
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    halves = halve.map([float(x) for x in range(n)])
    total, pid = add.submit(*halves).result()
    results = halves.result()
    return context.flow_run.id, total, {pid, *(p for _, p, _ in results)}, {run for _, _, run in results}


class Told:
    def __init__(self) -> None:
        self.runs: list[ObservedRun] = []

    def recipe(self, flow_name: str, run_id: str, parameters: Any) -> Recipe:
        return Recipe(record="full")

    def heard(self, invocation: Any, run_id: str) -> None: ...

    def observed(self, run: ObservedRun) -> None:
        self.runs.append(run)


def test_stages_run_in_their_pools_and_task_runs_are_the_flows_own(pools, task_runs) -> None:
    told = Told()
    run_id, total, pids, runs_seen = sums.with_options(task_runner=SLOTaskRunner(pools=pools, director=told))(6)
    assert total == 7.5
    assert os.getpid() not in pids
    assert runs_seen == {str(run_id)}, "tasks see the flow that submitted them"
    found = task_runs(run_id, 7)
    assert len(found) == 7
    assert {run.state_name for run in found} == {"Completed"}
    [sum_run] = [run for run in found if run.name.startswith("add")]
    sources = {source.id for inputs in sum_run.task_inputs.values() for source in inputs}
    assert sources == {run.id for run in found if run.name.startswith("halve")}
    [observed] = told.runs
    assert {row.stage: row.hardware for row in observed.stage_runs} == {"halve": CPU, "add": GPU}
    cold = [call for call in observed.invocations if call.cold]
    assert cold
    assert all(call.init_s > 0 for call in cold), "what a job took to start is measured"


@pytest.mark.slow
def test_a_stage_whose_job_finds_no_gpu_counts_for_machines_without_one_and_the_flow_is_told(
    pools, tmp_path, caplog
) -> None:
    told = Told()
    rich = WorkPool(GPU, (Size(0.5, 512, 1),), tmp_path, concurrency=1)
    add_alone = flow(lambda: add.submit((1.0, 0, "")).result()[0], name="no gpu there")
    try:
        assert add_alone.with_options(task_runner=SLOTaskRunner(pools=[rich], director=told))() == 1.0
    finally:
        shut_offices()
    [row] = told.runs[0].stage_runs
    assert row.hardware == f"{GPU}-cpu"
    assert row.cost_usd == pytest.approx(row.billed_s * price_list("local").rate(0.5, 512, 0, row.hardware))
    said = f"Stage 'add' was to have a GPU, and the machine where pool {GPU!r} has put its worker has none"
    assert said in caplog.text


def test_the_next_run_of_the_process_finds_its_pilots_warm(pools) -> None:
    runner = SLOTaskRunner(pools=pools)
    _, _, first, _ = sums.with_options(task_runner=runner)(2)
    _, _, second, _ = sums.with_options(task_runner=runner)(2)
    assert first & second


def test_the_worker_of_a_job_comes_from_a_fork_of_the_job_and_not_from_another_interpreter(pools) -> None:
    _, _, pids, _ = sums.with_options(task_runner=SLOTaskRunner(pools=pools))(2)
    for pid in pids:
        zygote, job, *_ = psutil.Process(pid).parents()
        assert zygote.cmdline() == job.cmdline()


@slo_task(pool=CPU)
@task
def integrations() -> tuple[set[str], set[str]]:
    installed = {point.value.partition(":")[0] for point in entry_points(group="prefect.collections")}
    return installed, installed & sys.modules.keys()


@flow
def looks_around() -> tuple[set[str], set[str]]:
    return integrations.submit().result()


def test_a_worker_imports_no_integration_of_prefect_to_know_its_flow(pools) -> None:
    installed, imported = looks_around.with_options(task_runner=SLOTaskRunner(pools=pools))()
    assert "prefect_dask" in installed
    assert "prefect_dask" not in imported


def test_there_is_one_deployment_for_each_pool(pools) -> None:
    sums.with_options(task_runner=SLOTaskRunner(pools=pools))(1)
    wanted = DeploymentFilter(name=DeploymentFilterName(any_=[CPU, GPU]))
    with get_client(sync_client=True) as client:
        found = client.read_deployments(deployment_filter=wanted)
    assert sorted(deployment.name for deployment in found) == [CPU, GPU]
    assert {deployment.entrypoint for deployment in found} == {"prefect_slo.runner.workpool.job.pilot"}


@slo_task(pool=CPU, idempotent=True)
@task
def once_killed(flag: str) -> str:
    path = Path(flag)
    if path.exists():
        return "second time"
    path.write_text(str(os.getpid()))
    time.sleep(PATIENCE_S)
    return "never"


@slo_task(pool=CPU)
@task
def killed(flag: str) -> None:
    Path(flag).write_text(str(os.getpid()))
    time.sleep(PATIENCE_S)


@flow
def fragile(which: Any, flag: str) -> tuple[UUID, Any]:
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    future = which.submit(flag)
    until(lambda: Path(flag).exists() and Path(flag).read_text(), "the task never started")
    kill_pilot(int(Path(flag).read_text()))
    future.wait()
    return context.flow_run.id, future.state


def kill_pilot(worker: int) -> None:
    """Kill the job that a worker process belongs to, as a node that goes away would."""
    _zygote, job, *_ = psutil.Process(worker).parents()
    assert job.pid != os.getpid(), "the worker is a job's, not this process's"
    job.kill()


@pytest.mark.slow
def test_a_pilot_that_is_killed_costs_an_idempotent_task_nothing(pools, task_runs, tmp_path: Path) -> None:
    run_id, state = fragile.with_options(task_runner=SLOTaskRunner(pools=pools))(once_killed, str(tmp_path / "flag"))
    assert state.result() == "second time"
    assert {run.state_name for run in task_runs(run_id, 1)} == {"Completed"}


def test_a_pilot_that_is_killed_crashes_a_task_that_may_not_run_again(pools, task_runs, tmp_path: Path) -> None:
    run_id, state = fragile.with_options(task_runner=SLOTaskRunner(pools=pools))(killed, str(tmp_path / "flag"))
    assert state.name == "Crashed"
    with pytest.raises(WorkerLost, match="job has ended as Crashed"):
        state.result()
    assert {run.state_name for run in task_runs(run_id, 1)} == {"Crashed"}


def test_a_pool_that_does_not_exist_is_refused_where_it_is_first_used(prefect_server: str, tmp_path: Path) -> None:
    nowhere = WorkPool("nowhere", storage=tmp_path)
    lost = slo_task(pool="nowhere")(task(lambda x: x, name="lost"))

    @flow(task_runner=SLOTaskRunner(pools=[nowhere]))
    def calls() -> None:
        lost.submit(1).result()

    with pytest.raises(WorkPoolUnusable, match=r"'nowhere' does not exist. Create it"):
        calls()


@slo_task(pool="flows-paused", isolation="process")
@task
def patient(x: int) -> int:
    return x + 1


@flow
def waits(x: int) -> Any:
    return patient.submit(x).result()


def test_a_paused_pool_is_said_and_given_up_with_its_reason(
    prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.2)
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="flows-paused", type="process", is_paused=True))
    said: list[str] = []
    pool = WorkPool("flows-paused", storage=tmp_path, concurrency=1, patience_s=0.1, give_up_s=1.0)
    runner = SLOTaskRunner(pools=[Overheard(pool, said)])
    with pytest.raises(WorkerLost, match=r"no worker started.*'flows-paused' is paused.*prefect work-pool resume"):
        waits.with_options(task_runner=runner)(1)
    assert any("is paused" in text for text in said)
    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(tags=FlowRunFilterTags(all_=["prefect-slo"]))

        def waiting() -> list[Any]:
            asked = client.read_flow_runs(flow_run_filter=chosen)
            return [run for run in asked if run.work_pool_name == "flows-paused" and run.state_name != "Cancelled"]

        until(lambda: not waiting(), "jobs that nobody waits for any more are not called off")


@pytest.mark.slow
def test_a_paused_pool_is_waited_for(process_pool: Any, tmp_path: Path) -> None:
    process_pool("flows-resumed")
    with get_client(sync_client=True) as client:
        client.update_work_pool("flows-resumed", WorkPoolUpdate(is_paused=True))
    said: list[str] = []

    def resume(text: str) -> None:
        said.append(text)
        with get_client(sync_client=True) as client:
            client.update_work_pool("flows-resumed", WorkPoolUpdate(is_paused=False))

    pool = WorkPool("flows-resumed", storage=tmp_path, concurrency=1, patience_s=0.1)
    again = slo_task(pool="flows-resumed")(task(lambda x: x + 1, name="again"))
    calls = flow(lambda: again.submit(1).result(), name="calls")
    assert calls.with_options(task_runner=SLOTaskRunner(pools=[Overheard(pool, resume)]))() == 2
    assert "is paused" in said[0]


class Overheard:
    """A pool whose notices are heard."""

    def __init__(self, inner: WorkPool, said: Any) -> None:
        self.inner, self.said = inner, said
        self.pool, self.capacity = inner.pool, inner.capacity

    def backend(self, client: Any) -> Any:
        backend = self.inner.backend(client)
        backend._notice = self.said.append if isinstance(self.said, list) else self.said
        return backend


LONELY = """
import os, sys
from prefect import flow, task
from prefect_slo import SLOTaskRunner, WorkPool, slo_task

@slo_task(pool=sys.argv[1])
@task
def note(path):
    open(path, "w").write(str(os.getpid()))
    import time; time.sleep(600)

@flow(task_runner=SLOTaskRunner(pools=[WorkPool(sys.argv[1], storage=sys.argv[2], concurrency=1, heartbeat_s=0.3)]))
def lonely():
    note.submit(sys.argv[3]).result()

if __name__ == "__main__":
    lonely()
"""


@pytest.mark.slow
def test_pilots_end_by_themselves_when_their_flow_was_killed(pools, prefect_server: str, tmp_path: Path) -> None:
    script, storage, flag = tmp_path / "lonely.py", tmp_path / "mailboxes", tmp_path / "flag"
    script.write_text(LONELY)
    parent = subprocess.Popen(
        [sys.executable, str(script), CPU, str(storage), str(flag)],
        env={**os.environ, "PREFECT_API_URL": prefect_server, "PREFECT_LOGGING_LEVEL": "ERROR"},
    )
    until(lambda: flag.exists() and flag.read_text(), "its task never started")
    worker = int(flag.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not psutil.pid_exists(worker), "its worker goes on for nobody")
    until(lambda: not list(storage.rglob("to-*")), "its mailbox is left behind")

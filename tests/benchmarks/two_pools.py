"""``examples/video_analytics`` on two work pools, planned onto the one or the other: a real server, real workers.

``python tests/benchmarks/two_pools.py --out DIR [--every 25]``. Two plans are made, each the fastest within a budget
that forbids nothing: one from the table that comes with the example, where the GPU is an H100, one from a table that is
measured here, where array code runs under NumPy on the same cores as everything else. By each, the flow runs once from
this script and once from a deployment that is started in Prefect's UI (by headless Chromium; by the API's own call
where playwright isn't installed, and ``DIR/summary.json`` says so). Whatever the plan says, workers in ``gpu`` run the
GPU variant under NumPy: there is no GPU here. Checked: which pool got jobs, with which job variables; that all task
runs are the one flow run's, and their edges. ``DIR/*.png`` are pictures of the flow runs of deployments in the UI.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

EXAMPLE = Path(__file__).parents[2] / "examples" / "video_analytics"
GPU_BENCHMARK = Path(__file__).with_name("video_gpu.py")
STAGES = ("split", "extract", "preprocess", "detect")
PATIENCE_S = 300.0
T = TypeVar("T")


def until(look: Callable[[], T | None], what: str) -> T:
    """What ``look`` finds, once it finds something."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {PATIENCE_S:g} s")
        time.sleep(0.5)
    return found


@contextmanager
def running(*command: str, env: dict[str, str], log: Path) -> Iterator[None]:
    """A process that is asked to end at the end."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=env, stdout=file, stderr=file,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def surroundings(folder: Path) -> Iterator[str]:
    """A server with a home and a database of its own, and a worker for each of its pools; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    own = {
        "PREFECT_HOME": str(folder / "home"), "PREFECT_PROFILES_PATH": str(folder / "profiles.toml"),
        "PREFECT_API_URL": f"{address}/api", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_INTEGRATIONS_SLO_HOME": str(folder / "slo"),
        "PREFECT_INTEGRATIONS_SLO_LEDGER_PATIENCE_S": "1",  # both pools have this one machine
    }  # fmt: skip
    os.environ.update(own)
    env = dict(os.environ)
    prefect = (sys.executable, "-m", "prefect")
    with ExitStack() as stack:
        server = (*prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port))
        stack.enter_context(running(*server, env=env, log=folder / "server.log"))
        until(lambda: _healthy(address), "the server answers")
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import WorkPoolCreate

        for pool in ("cpu", "gpu"):
            with get_client(sync_client=True) as client:
                client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
            worker = (*prefect, "worker", "start", "--pool", pool, "--name", f"worker-of-{pool}")
            stack.enter_context(running(*worker, env=env, log=folder / f"{pool}.log"))
        yield address


def _healthy(address: str) -> bool | None:
    import httpx

    try:
        return httpx.get(f"{address}/api/health", timeout=5).is_success or None
    except httpx.HTTPError:
        return None


def plan_from(table: Path, hardware: str) -> Any:
    """The fastest plan of the example by a table, on a machine with as many cores as this one."""
    import pandas as pd

    from prefect_slo.models import WorkflowModel
    from prefect_slo.objective import Budget
    from prefect_slo.planner import make_plan
    from prefect_slo.workflow import Workflow

    cores = os.cpu_count() or 1
    workflow = Workflow.load(EXAMPLE / "workflow.toml")
    stages = []
    for stage in workflow.stages:
        pools = tuple(
            replace(pool, sizes=tuple(size for size in pool.sizes if size.vcpus <= cores)) for pool in stage.menu.pools
        )
        stages.append(replace(stage, menu=replace(stage.menu, pools=pools)))
    rows = pd.read_csv(table)
    rows["hardware"] = rows["hardware"].replace(hardware, "h100")
    model = WorkflowModel(replace(workflow, stages=tuple(stages))).fit(rows)
    return make_plan(model, Budget(10.0), seed=0)


def measured_here(folder: Path) -> Path:
    """A table of this machine, array code under NumPy."""
    command = [sys.executable, str(GPU_BENCHMARK), "--gpu", "numpy", "--batches", "1", "4", "--repeats", "4"]
    subprocess.run([*command, "--out", str(folder)], check=True, capture_output=True)
    return folder / "stage_runs.csv"


class Prefect:
    """What the server knows."""

    def __init__(self) -> None:
        from prefect.client.orchestration import get_client

        self.client = get_client(sync_client=True).__enter__()

    def finished(self, run: UUID) -> Any | None:
        found = self.client.read_flow_run(run)
        return found if found.state is not None and found.state.is_final() else None

    def runs_of(self, deployment: UUID) -> list[Any]:
        from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

        chosen = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
        return list(self.client.read_flow_runs(deployment_filter=chosen))

    def jobs(self, since: Any) -> dict[str, list[dict[str, Any]]]:
        """Job variables of the pilots that were asked for since then, by pool; with the workers' sizes."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags

        chosen = FlowRunFilter(tags=FlowRunFilterTags(all_=["prefect-slo"]))
        found: dict[str, list[dict[str, Any]]] = {}
        for run in self.client.read_flow_runs(flow_run_filter=chosen, limit=200):
            if run.created is not None and run.created >= since and run.start_time is not None:
                size = run.parameters["order"]["size"]
                found.setdefault(str(run.work_pool_name), []).append({"variables": run.job_variables, "size": size})
        return found

    def tasks(self, run: UUID) -> list[Any]:
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
        return list(self.client.read_task_runs(flow_run_filter=chosen, limit=200))

    def settled(self, run: UUID) -> list[Any] | None:
        """Its task runs, once all have ended and there are as many as there have to be."""
        found = self.tasks(run)
        kinds = [_stage(one) for one in found]
        items = kinds.count("extract")
        whole = kinds.count("split") == 1 and items == kinds.count("preprocess") == kinds.count("detect") > 0
        return found if whole and all(one.state_name == "Completed" for one in found) else None


def _stage(task_run: Any) -> str:
    return str(task_run.name).rsplit("-", 1)[0]


def checked(prefect: Prefect, run: UUID, since: Any, on: str) -> dict[str, Any]:
    """What the bar asks for, of one flow run; raises where it is not so."""
    state = prefect.client.read_flow_run(run).state
    assert state is not None
    assert state.is_completed(), state
    tasks = until(lambda: prefect.settled(run), "task runs have all arrived")
    by_id = {one.id: one for one in tasks}
    before = dict(zip(STAGES[1:], STAGES, strict=False))
    edges = 0
    for one in tasks:
        sources = {getattr(source, "id", None) for inputs in one.task_inputs.values() for source in inputs}
        expected = before.get(_stage(one))
        assert {_stage(by_id[source]) for source in sources} == ({expected} if expected else set()), one
        edges += len(sources)
    jobs = prefect.jobs(since)
    assert "cpu" in jobs, "three stages are always there"
    assert ("gpu" in jobs) == (on == "gpu"), jobs.keys()
    variables = [job["variables"] for job in jobs.get("gpu", ())]
    assert all(given.get("env") == {"VIDEO_ARRAYS": "numpy"} for given in variables), variables
    assert not any(job["variables"] for job in jobs["cpu"]), "nothing is said to jobs in cpu"
    assert all(job["size"]["gpu"] == 1 and job["size"]["hardware"] == "h100" for job in jobs.get("gpu", ()))
    return {
        "flow_run": str(run), "task_runs": len(tasks), "edges": edges,
        "jobs": {pool: len(found) for pool, found in jobs.items()}, "job_variables_in_gpu": variables[:1],
    }  # fmt: skip


def deploy(prefect: Prefect, name: str, plan: Path, storage: Path, every: int) -> UUID:
    """The example by a plan, to be run by the worker of ``cpu``."""
    from prefect.flows import Flow

    variables = {"VIDEO_PLAN": str(plan), "VIDEO_STORAGE": str(storage), "VIDEO_DEVICE": "numpy"}
    os.environ.update(variables)  # the flow is loaded here once, to read its parameters
    loaded: Any = Flow.from_source(source=str(EXAMPLE), entrypoint="deployed.py:video_analytics")
    return UUID(
        str(
            loaded.deploy(
                name=name, work_pool_name="cpu", parameters={"every": every}, job_variables={"env": variables},
                build=False, push=False, print_next_steps=False,
            )
        )
    )  # fmt: skip


class Browser:
    """Prefect's UI in headless Chromium, opened anew each time: while it is open, Prefect takes this thread for async.

    Raises:
        ImportError: Playwright is not installed.
    """

    def __init__(self, address: str) -> None:
        from playwright.sync_api import sync_playwright

        self._address, self._open = address, sync_playwright

    def start(self, deployment: UUID) -> None:
        """Press Run, and Quick run."""
        with self._page(f"deployments/deployment/{deployment}") as page:
            page.get_by_role("button", name="Run", exact=True).click()
            page.get_by_text("Quick run").click()
            page.wait_for_timeout(2000)

    def picture(self, run: UUID, path: Path) -> None:
        """The page of a flow run."""
        with self._page(f"runs/flow-run/{run}") as page:
            page.wait_for_timeout(6000)
            page.screenshot(path=path)

    @contextmanager
    def _page(self, where: str) -> Iterator[Any]:
        with self._open() as playwright:
            program = os.environ.get("CHROMIUM", "/usr/bin/chromium")
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 860})
            page.goto(f"{self._address}/{where}")
            try:
                yield page
            except Exception:
                page.screenshot(path=Path(tempfile.gettempdir()) / "two_pools_failed.png")
                raise
            finally:
                browser.close()


def browser(address: str) -> Browser | None:
    """The UI, where there is something to open it with."""
    try:
        return Browser(address)
    except ImportError:
        return None


def demonstrate(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both plans, both ways of starting."""
    sys.path.insert(0, str(EXAMPLE))
    tables = {"gpu": EXAMPLE / "stage_runs.csv", "cpu": options.here or measured_here(folder / "here")}
    told: dict[str, Any] = {}
    with ExitStack() as stack:
        address = stack.enter_context(surroundings(folder))
        from flow import planned
        from prefect.types._datetime import now

        from prefect_slo.runner.work_pools import shut_offices

        prefect, ui = Prefect(), browser(address)
        told["started_by"] = "Chromium, in the UI" if ui else "the API's call: playwright is not installed"
        storage = folder / "storage"
        for on, table in tables.items():
            plan = plan_from(table, "h100")
            assert plan["detect"].pool == on, f"planned onto {plan['detect'].pool}"
            path = options.out / f"plan-{on}.json"
            path.write_text(plan.to_json(), encoding="utf-8")
            chosen = {name: f"{stage.pool} {stage.size}, batch {stage.batch}" for name, stage in plan.stages.items()}
            told[on] = {"plan": chosen, "p95_s": plan.predicted.latency_s.p95}

            since = now("UTC")
            state = planned(plan, str(storage), "numpy")(every=options.every, return_state=True)
            shut_offices()
            people = state.result()
            told[on]["from_a_script"] = checked(prefect, state.state_details.flow_run_id, since, on)

            deployment = deploy(prefect, f"fastest-on-{on}", path, storage, options.every)
            since = now("UTC")
            if ui is not None:
                ui.start(deployment)
                run = until(lambda d=deployment: next(iter(prefect.runs_of(d)), None), "the UI has started a run").id
            else:
                run = prefect.client.create_flow_run_from_deployment(deployment).id
            until(lambda run=run: prefect.finished(run), "the deployment's run has ended")
            told[on]["from_a_deployment"] = checked(prefect, run, since, on)
            if ui is not None:
                ui.picture(run, options.out / f"flow-run-on-{on}.png")
            told[on]["frames_with_people"] = sorted(people)
    assert told["cpu"]["frames_with_people"] == told["gpu"]["frames_with_people"], "the variants agree"
    return told


def main() -> None:
    """Demonstrate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("two_pools"))
    parser.add_argument("--every", type=int, default=25, help="one still for so many frames")
    parser.add_argument("--here", type=Path, help="a table that was measured here before")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            told = demonstrate(options, Path(folder))
        except BaseException:
            for log in Path(folder).glob("*.log"):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
            raise
    (options.out / "summary.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()

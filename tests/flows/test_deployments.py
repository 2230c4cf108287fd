"""Deployments as users make them, on a real server with a real worker: the repository's own, and one that is pinned."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment

from prefect_slo.loop.deploying import pin
from prefect_slo.loop.pinning import VARIABLE
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import Size
from prefect_slo.settings import SLOSettings
from prefect_slo.telemetry.store import read_runs, sweep_orphans

ROOT = Path(__file__).parents[2]
POOL = "default"
THREADS = Size(1, 256, hardware="thread")
SOURCE = """
from prefect import flow, task
from prefect_slo import slo

@task
def letter(x):
    return x

@slo(latency="20s", explore=0)
@flow(name="deployed-with-a-plan")
def letters(n: int = 2):
    return sum(letter.map(range(n)).result())
"""


@pytest.fixture(scope="module")
def deploy(prefect_server: str, process_pool: Any) -> Callable[..., str]:
    """Runs ``prefect deploy`` in a folder; what it says. The pool has a worker, which brings its template."""
    process_pool(POOL)
    with get_client(sync_client=True) as client:
        deadline = time.monotonic() + 120
        while not client.read_work_pool(POOL).base_job_template:
            assert time.monotonic() < deadline, "the worker never came"
            time.sleep(0.1)

    def run(folder: Path, *arguments: str) -> str:
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", *arguments]
        told = {"PREFECT_API_URL": prefect_server, "PREFECT_LOGGING_LEVEL": "ERROR"}
        done = subprocess.run(command, cwd=folder, env=os.environ | told, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def deployment(name: str) -> Any:
    with get_client(sync_client=True) as client:
        return client.read_deployment_by_name(name)


def finished(name: str, **arguments: Any) -> Any:
    run = run_deployment(name, poll_interval=0.2, as_subflow=False, timeout=240, **arguments)
    assert run.state is not None
    return run.state


def test_all_deployments_of_the_repository_are_made_and_one_is_run_by_a_worker(deploy: Any, process_pool: Any) -> None:
    deploy(ROOT, "--all")
    for name in ("slo-profile/profile", "slo-refit/refit", "slo-replan/replan", "slo-report/report"):
        found = deployment(name)
        assert found.work_pool_name == POOL
        assert not any(schedule.active for schedule in found.schedules)
    assert deployment("slo-replan/replan").parameters == {"min_change": 0.05, "max_change": 0.5}
    assert list(deployment("ml-pipeline/ml-pipeline").parameter_openapi_schema["properties"]) == ["scale"]
    assert finished("slo-report/report", parameters={"flow_name": None}).is_completed()


@pytest.mark.slow
def test_a_pinned_deployment_runs_by_its_plan_and_one_run_by_another(deploy: Any, tmp_path: Path) -> None:
    (tmp_path / "letters.py").write_text(SOURCE)
    deploy(tmp_path, "letters.py:letters", "--name", "pinned", "--pool", POOL)
    plan = Plan("any", None, {"letter": StagePlan(2, THREADS, "thread")})
    other = tmp_path / "other.json"
    other.write_text(Plan("deployed-with-a-plan", None, {"letter": StagePlan(1, THREADS, "thread")}).to_json())
    name = "deployed-with-a-plan/pinned"
    pin(name, plan)
    assert finished(name).is_completed()
    assert finished(name, job_variables={"env": {VARIABLE: str(other)}}).is_completed()
    records: list[Any] = []
    deadline = time.monotonic() + 60
    while len(records) < 2 and time.monotonic() < deadline:
        sweep_orphans(SLOSettings().telemetry_directory)  # what a busy API has refused is published later
        records = [record for entry in read_runs("deployed-with-a-plan") for record in entry.records]
        time.sleep(0.2)
    workers = [stage.row.workers for record in sorted(records, key=lambda r: r.started_at) for stage in record.stages]
    assert workers == [2, 1]

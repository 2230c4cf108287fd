"""The loop over two pools: both are profiled, the planner chooses by price and time, and runs obey."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import Flow, flow, task

from prefect_slo import slo, slo_task
from prefect_slo.loop import knowledge, learning, saying
from prefect_slo.loop.director import LoopDirector
from prefect_slo.loop.profiling import profile
from prefect_slo.runner.recipe import ObservedRun
from prefect_slo.testing.aws import LocalAws, local_aws

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def account() -> Iterator[LocalAws]:
    with local_aws() as account:
        yield account


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path))
    monkeypatch.setattr(saying, "_said", set())
    monkeypatch.setattr(knowledge, "_REMEMBERED", knowledge._Remembered())
    monkeypatch.setattr(learning, "UNLEARNED", learning._Unlearned())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[ObservedRun]:
    found: list[ObservedRun] = []
    observed = LoopDirector.observed

    def both(self: LoopDirector, run: ObservedRun) -> None:
        found.append(run)
        observed(self, run)

    monkeypatch.setattr(LoopDirector, "observed", both)
    return found


@slo_task(pool=("process", "lambda"))
@task
def work(x: int) -> int:
    time.sleep(0.1)
    return x


def bounded(account: LocalAws, name: str, **bound: object) -> Flow[..., int]:
    @flow(name=name)
    def works() -> int:
        return sum(work.map(range(8)).result())

    pool = account.pool(memory_mb=(128, 256), workers=(1, 4), concurrency=4)
    menu = {"workers": (1, 2), "vcpus": (1.0,)}
    return slo(**bound, pools=[pool], menu=menu, explore=0, mode="enforce")(works)


def test_both_pools_are_measured_and_a_plan_chooses_between_them(account: LocalAws, seen: list[ObservedRun]) -> None:
    """0.1 s of sleep costs less on a fraction of a vCPU than on a whole one."""
    sized = bounded(account, "works-elsewhere", latency="20s")
    report = profile(sized, repeats=2, max_seconds=400)
    assert report.identified, report.stopped
    assert {row.hardware for run in seen for row in run.stage_runs} >= {"cpu", "lambda"}
    known = knowledge.knowledge("works-elsewhere")
    assert known.plan is not None
    assert known.plan["work"].pool == "lambda"
    seen.clear()
    assert sized() == sum(range(8))
    [run] = seen
    assert run.stages["work"].pool == "lambda"
    assert run.stage_runs[0].memory_mb == known.plan["work"].size.memory_mb
    assert 0 < run.cost_usd < 1e-4

"""What starts add where workers are leased elsewhere: how often, how long, and what is paid for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.models import WorkflowModel
from prefect_slo.models.startup import Startup, mean_beyond, seen_by_setting
from prefect_slo.objective import Latency
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.planner import make_plan
from prefect_slo.resources import Menu, Option, Pool, Size
from prefect_slo.workflow import Edge, Stage, Workflow

ELSEWHERE = Size(1, 1024, hardware="elsewhere")
START_S, IDLE_S = 4.0, 1.5


@pytest.fixture
def workflow() -> Workflow:
    """Two stages on one pool, one after the other."""
    menu = Menu(workers=(1, 2), sizes=(ELSEWHERE,), pools=(Pool("pool", (ELSEWHERE,)),))
    return Workflow("pooled", (Stage("read", (), menu), Stage("write", (Edge("read"),), menu)))


@pytest.fixture
def leased() -> Callable[..., StageRuns]:
    """Forty runs of 2 s a stage; every ``each``-th starts cold, in both stages, and pays for its start in part."""

    def build(*, each: int = 4, hardware: str = "elsewhere", paid: bool = True) -> StageRuns:
        rng, rows = np.random.default_rng(1), list[StageRun]()
        for number in range(40):
            cold = number % each == 0
            for stage in ("read", "write"):
                work = 2.0 * float(rng.lognormal(0, 0.02))
                wall = work + (START_S * float(rng.lognormal(0, 0.1)) if cold else 0.0)
                held = work + (IDLE_S + 3.0 if cold else 0.2)
                rows.append(
                    StageRun(
                        f"run-{number:02d}", stage, 1 + number % 2, 1024, 1.0, wall, overhead_s=0.05 * wall, items=0,
                        cold=cold, hardware=hardware, start_s=wall - work,
                        billed_s=held * (1 + number % 2) if paid else float("nan"),
                    )
                )  # fmt: skip
        return StageRuns.of(rows)

    return build


def plan(workers: int = 1) -> dict[str, Option]:
    return {name: Option(workers, ELSEWHERE, "pool") for name in ("read", "write")}


def test_ordinary_runs_elsewhere_start_cold_as_often_as_rows_show(workflow: Workflow, leased: Any) -> None:
    model = WorkflowModel(workflow).fit(leased(each=5))
    drawn = model.predict(plan(2)).samples.latency_s
    assert np.mean(drawn > 4.0 + START_S) == pytest.approx(0.2, abs=0.05)
    assert np.median(drawn) == pytest.approx(4.0, rel=0.05)


def test_stages_of_one_run_start_cold_together(workflow: Workflow, leased: Any) -> None:
    samples = WorkflowModel(workflow).fit(leased()).predict(plan(1)).samples
    read, write = (samples.stage_latency_s[name] > 4.0 for name in ("read", "write"))
    assert np.mean(read == write) > 0.99


def test_the_tail_of_runs_is_that_of_their_starts(workflow: Workflow, leased: Any) -> None:
    rows = leased(each=4)
    predicted = WorkflowModel(workflow).fit(rows).predict(plan(1)).latency_s.p95
    walls: dict[str, float] = {}
    for row in rows.rows():
        walls[row.run_id] = walls.get(row.run_id, 0.0) + row.wall_s
    assert predicted == pytest.approx(float(np.quantile(list(walls.values()), 0.95)), rel=0.1)


def test_starts_of_a_pipeline_follow_one_another_and_a_promise_counts_them() -> None:
    """A stage that takes items one by one asks for its workers when the first is there, not when the run begins."""
    menu = Menu(workers=(1,), sizes=(ELSEWHERE,), pools=(Pool("pool", (ELSEWHERE,)),))
    stages = (Stage("read", (), menu, items=8), Stage("write", (Edge("read", "item"),), menu, items=8))
    workflow, rng, rows, latencies = Workflow("piped", stages), np.random.default_rng(2), [], {}
    for number in range(60):
        cold, work = number % 4 == 1, 0.8 * float(rng.lognormal(0, 0.02))
        start = START_S * float(rng.lognormal(0, 0.05)) if cold else 0.0
        latencies[f"run-{number:02d}"] = 2 * start + 1.125 * work
        for stage, wall in (("read", start + work), ("write", start + work)):
            rows.append(
                StageRun(
                    f"run-{number:02d}", stage, 1, 1024, 1.0, wall, overhead_s=wall - work, items=8, cold=cold,
                    hardware="elsewhere", start_s=start, billed_s=work + start,
                )
            )  # fmt: skip
    model = WorkflowModel(workflow).fit(StageRuns.of(rows), run_latency_s=latencies)
    real = np.quantile(list(latencies.values()), (0.5, 0.95))
    predicted = model.predict(plan(1)).latency_s
    assert (predicted.p50, predicted.p95) == pytest.approx(tuple(real), rel=0.05)
    with pytest.raises(InfeasibleSlo):
        make_plan(model, Latency(0.8 * float(real[1])), seed=0)
    made = make_plan(model, Latency(1.15 * float(real[1])), seed=0)
    assert made.certificate is not None
    assert made.certificate.confidence >= 0.99


def test_local_workers_and_rows_that_were_not_leased_are_predicted_warm(workflow: Workflow, leased: Any) -> None:
    drawn = WorkflowModel(workflow).fit(leased(paid=False)).predict(plan(1)).samples.latency_s
    assert np.max(drawn) < 4.0 + START_S


def test_a_cold_run_that_is_asked_for_is_cold_whatever_the_rows_show(workflow: Workflow, leased: Any) -> None:
    model = WorkflowModel(workflow).fit(leased(each=5))
    assert np.min(model.predict(plan(1), cold=True).samples.latency_s) > 4.0 + START_S


def test_starts_and_idling_are_paid_for_and_polling_is_not(workflow: Workflow, leased: Any) -> None:
    rows = leased(each=4)
    predicted = WorkflowModel(workflow).fit(rows).predict(plan(1)).cost_usd.mean
    rate = workflow["read"].menu.prices_of("pool").rate(1, 1024, 0.0, "elsewhere")
    paid = [row.billed_s for row in rows.rows() if row.workers == 1]
    assert predicted == pytest.approx(2 * float(np.mean(paid)) * rate, rel=0.1)


def test_a_setting_leans_on_the_others_until_it_was_seen_often() -> None:
    seen = seen_by_setting(np.array([1.0] * 10 + [4.0] * 10), np.ones(20), np.array([True] * 10 + [False] * 10))
    startup = Startup(seen=seen)
    assert startup.share(2, 1.0) == pytest.approx(0.5)
    assert startup.share(1, 1.0) == pytest.approx(10 / 11)
    assert startup.share(4, 1.0) == pytest.approx(1 / 11)
    assert Startup().share(1, 1.0) == 0.0


def test_a_sweep_that_met_every_setting_cold_once_says_nothing_of_ordinary_runs() -> None:
    workers = np.repeat([1.0, 2.0, 4.0], 4)
    swept = Startup(seen=seen_by_setting(workers, np.ones(12), np.tile([True, False, False, False], 3)))
    assert swept.share(1, 1.0) == swept.share(8, 1.0) == 0.0
    once = Startup(seen=seen_by_setting(np.array([1.0, 2.0]), np.ones(2), np.array([True, True])))
    assert once.share(1, 1.0) == 0.0


def test_rows_that_do_not_say_what_was_paid_count_for_none() -> None:
    cold = np.array([False, False, True])
    assert mean_beyond([3.0, np.nan, 5.0], np.full(3, 2.0), cold) == (1.0, 3.0)
    assert mean_beyond([np.nan] * 3, np.full(3, 2.0), cold) == (0.0, 0.0)


def test_what_few_starts_leave_open_differs_from_truth_to_truth_and_closes_with_more() -> None:
    def spread(n_rows: int) -> float:
        wall = np.random.default_rng(2).lognormal(1, 0.2, n_rows)
        drawn, _ = Startup(wall, 0.5 * wall).sample(200 * 400, np.random.default_rng(3), blocks=200)
        return float(np.std(np.quantile(drawn.reshape(200, 400), 0.9, axis=1)) / np.quantile(wall, 0.9))

    assert spread(8) > 0.08
    assert spread(200) < 0.04


def test_a_start_may_take_longer_than_any_that_was_seen_under_a_promise() -> None:
    startup = Startup(np.array([3.0, 4.0, 5.0]), np.array([1.5, 2.0, 2.5]))
    wall, busy = startup.sample(10_000, np.random.default_rng(0), blocks=100)
    assert 0.05 < np.mean(wall > 5.0) < 0.25
    np.testing.assert_allclose(busy, 0.5 * wall)
    plain, _ = startup.sample(10_000, np.random.default_rng(0))
    assert plain.max() == 5.0


def test_one_start_says_little_of_the_next_under_a_promise() -> None:
    wall, _ = Startup(np.array([4.0]), np.array([4.0])).sample(10_000, np.random.default_rng(0), blocks=100)
    assert wall.min() == 4.0
    assert np.quantile(wall, 0.95) > 4.5

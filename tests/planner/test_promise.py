"""A promise holds under nearly every truth that the rows allow for, and real runs may tighten it."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import norm

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.models import WorkflowModel
from prefect_slo.models.calibration import Calibration
from prefect_slo.objective import Budget, Latency
from prefect_slo.plan import Plan
from prefect_slo.planner import make_plan
from prefect_slo.planner.problem import Goal
from prefect_slo.planner.promise import CLOSE, Promise, Verdict, sure_quantile
from prefect_slo.planner.sampling import Sampler
from prefect_slo.resources import Menu, Size
from prefect_slo.workflow import Edge, Stage, Workflow

MENU = Menu("local", (1, 2, 4, 8), (Size(1, 1024), Size(2, 2048), Size(4, 4096)))
WORKFLOW = Workflow("two", (Stage("a", menu=MENU), Stage("b", (Edge("a"),), MENU)))
BOUND_S = 8.0


def rows(repeats: int, sigma: float = 0.1, seed: int = 0) -> dict[str, list[object]]:
    rng = np.random.default_rng(seed)
    columns: dict[str, list[object]] = {c: [] for c in ("run_id", "stage", "workers", "vcpus", "memory_mb", "wall_s")}
    options = [option for _ in range(repeats) for option in MENU.options()]
    for run, option in enumerate(options):
        for stage in ("a", "b"):
            wall = (1 + 12 / (option.workers * option.vcpus)) * float(rng.lognormal(0, sigma))
            row = (f"r{run}", stage, option.workers, option.vcpus, option.memory_mb, wall)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return columns


@cache
def model(repeats: int = 3) -> WorkflowModel:
    return WorkflowModel(WORKFLOW).fit(rows(repeats))


def surely(plan: Plan, confidence: float, source: WorkflowModel) -> float:
    """P95 that a plan keeps under that share of fresh truths."""
    drawn = source.sample_truths(plan, 400, 1000, np.random.default_rng(77)).latency_s.reshape(400, 1000)
    return float(np.quantile(np.quantile(drawn, 0.95, axis=1), confidence))


@pytest.mark.parametrize("between", [0.0, 0.05, 0.2])
def test_what_is_surely_kept_is_that_of_the_truths_and_not_of_the_luck_of_few_runs(between: float) -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(20):
        centres = between * rng.standard_normal((256, 1))
        values = np.exp(centres + 0.1 * rng.standard_normal((256, 400)))
        found.append(np.log(sure_quantile(values, 0.95, 0.99)))
    expected = 0.1 * norm.ppf(0.95) + between * norm.ppf(0.99)
    assert np.mean(found) == pytest.approx(expected, abs=0.01 + 0.03 * between)


def test_a_plan_keeps_its_bound_under_the_share_of_truths_that_was_asked_for() -> None:
    plans = {c: make_plan(model(), Latency(BOUND_S, confidence=c)) for c in (0.5, 0.99)}
    assert surely(plans[0.99], 0.98, model()) <= BOUND_S
    assert surely(plans[0.5], 0.45, model()) <= BOUND_S
    assert plans[0.99].predicted.cost_usd.mean >= plans[0.5].predicted.cost_usd.mean
    assert plans[0.99].certificate.confidence == 0.99


def test_more_runs_make_the_same_promise_cheaper() -> None:
    few, many = (make_plan(model(repeats), Latency(BOUND_S)) for repeats in (1, 12))
    assert many.predicted.cost_usd.mean < few.predicted.cost_usd.mean
    assert many.certificate.price_of_certainty < few.certificate.price_of_certainty + 0.01


def test_a_budget_is_promised_alike() -> None:
    budget = 1.1 * make_plan(model(), Latency(BOUND_S)).predicted.cost_usd.p95
    plan = make_plan(model(), Budget(budget))
    drawn = model().sample_truths(plan, 400, 1000, np.random.default_rng(78)).cost_usd.reshape(400, 1000)
    assert np.quantile(np.quantile(drawn, 0.95, axis=1), 0.98) <= budget


def test_where_nothing_can_be_promised_the_share_for_what_is_not_known_is_told() -> None:
    noisy = WorkflowModel(WORKFLOW).fit(rows(1, sigma=0.3))
    with pytest.raises(InfeasibleSlo, match=r"for what the runs so far leave open: profile more") as refused:
        make_plan(noisy, Latency(2.4))
    nearest = refused.value.nearest
    assert 0.05 < nearest.unsure < 1
    assert make_plan(noisy, Latency(1.001 * nearest.bound)).certificate is not None


def test_a_model_that_is_sure_of_itself_is_tested_on_fresh_samples_alone(model_of) -> None:
    sampler = Sampler(model_of("chain", 2, seed=0))
    assert not sampler.uncertain
    assert sampler.truths(sampler.problem(), (0, 0)) is None


def test_runs_that_took_longer_than_predicted_make_plans_for_a_smaller_bound() -> None:
    slow = Calibration(scores=(1.25,) * 40)
    plan = make_plan(model(), Latency(BOUND_S), calibration=slow)
    assert 1.25 * surely(plan, 0.98, model()) <= BOUND_S
    assert plan.certificate.calibration_runs == 0, "another plan's runs claim nothing of this one"
    assert plan.objective.latency.bound_s == BOUND_S
    fast = make_plan(model(), Latency(BOUND_S), calibration=Calibration(scores=(0.7,) * 40))
    assert fast.stages == make_plan(model(), Latency(BOUND_S)).stages, "nothing is loosened"


@pytest.mark.parametrize("bound", [Latency(0.5), Budget(1e-6)])
def test_the_nearest_bound_that_is_told_can_be_asked_for_with_the_same_calibration(bound: Latency | Budget) -> None:
    slow = Calibration(scores=(1.25,) * 40)
    with pytest.raises(InfeasibleSlo) as refused:
        make_plan(model(), bound, calibration=slow)
    nearest = 1.002 * refused.value.nearest.bound
    again = Latency(nearest) if isinstance(bound, Latency) else Budget(nearest)
    assert make_plan(model(), again, calibration=slow).certificate is not None
    with pytest.raises(InfeasibleSlo) as plain:
        make_plan(model(), bound)
    assert refused.value.nearest.bound == pytest.approx(1.25 * plain.value.nearest.bound, rel=0.03)


def test_a_plan_that_breaks_its_promise_asks_for_more_room_than_it_had() -> None:
    sampler, goal = Sampler(model()), Goal(0.95, latency_bound_s=BOUND_S)
    problem = sampler.problem()
    test = Promise(sampler, problem, goal, 0.955, 0.99)
    plans = list(problem.choices())
    verdicts = {plan: test.judge(plan) for plan in plans[:: len(plans) // 24]}
    broken = {plan: verdict for plan, verdict in verdicts.items() if not verdict.kept}
    assert 0 < len(broken) < len(verdicts)
    for plan, verdict in broken.items():
        assert problem.score(plan, goal.at(0.955).within(*verdict.wider)) == np.inf
    for plan, verdict in verdicts.items():
        if verdict.kept:
            assert problem.score(plan, goal.at(0.955).within(*verdict.room)) < np.inf


def test_only_a_promise_with_much_to_spare_makes_way_for_a_bolder_one() -> None:
    assert Verdict((CLOSE + 0.001, 0.0), (1.2, 1.0)).close
    assert not Verdict((CLOSE - 0.1, 0.0), (1.2, 1.0)).close
    assert not Verdict((1.01, 0.0), (1.2, 1.0)).close
    assert Verdict((0.0, 0.0), (1.0, 1.0)).close


def test_plans_are_tested_by_the_same_truths_whatever_was_tested_before() -> None:
    fresh, used = Sampler(model()), Sampler(model())
    problem = fresh.problem()
    first, second = (0, 0), (3, 5)
    used.truths(problem, first)
    for one, other in zip(fresh.truths(problem, second), used.truths(problem, second), strict=True):
        np.testing.assert_array_equal(one, other)
    alike = fresh.truths(problem, (3, 4))
    assert np.corrcoef(np.median(alike[0], axis=1), np.median(fresh.truths(problem, second)[0], axis=1))[0, 1] > 0.3


def _benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "guarantee.py"
    spec = importlib.util.spec_from_file_location("guarantee", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["guarantee"] = module
    spec.loader.exec_module(module)
    return module


def test_a_few_promises_of_the_benchmark_are_kept() -> None:
    benchmark = _benchmark()
    found = [benchmark.replication("inside", noise, 3 + k, judged=40_000) for k, noise in enumerate(benchmark.NOISES)]
    assert all(result["feasible"] for result in found)
    assert all(result["kept"] > 0.945 for result in found)
    assert all(result["cost"] < 1.5 for result in found)
    assert "inside" in benchmark.summary(found)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["inside", "outside"])
def test_promises_of_the_benchmark_are_kept_as_often_as_claimed(family: str) -> None:
    benchmark = _benchmark()
    kinds = benchmark.NOISES
    found = [benchmark.replication(family, kinds[k % 3], 5000 + k, judged=100_000) for k in range(60)]
    assert not benchmark.rejected(found, family, at=0.001)
    assert np.median([result["cost"] for result in found if result["feasible"]]) < 1.10

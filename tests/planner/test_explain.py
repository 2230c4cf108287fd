from __future__ import annotations

import numpy as np
import pytest

from prefect_slo.errors import InvalidPlan
from prefect_slo.objective import Budget, Latency
from prefect_slo.planner import make_plan
from prefect_slo.planner.criticality import criticality
from prefect_slo.planner.explain import explain
from prefect_slo.planner.problem import Problem
from prefect_slo.resources import Size

FEW = {"samples": 800, "certify_samples": 5000}


def test_shares_of_the_path_add_up_and_a_chain_is_always_critical(model_of):
    problem = Problem.of(model_of("chain", 4, driver=0.0).tables(300, np.random.default_rng(0)))
    stages = criticality(problem, (0, 0, 0, 0))
    assert [stage.probability for stage in stages] == [1.0] * 4
    assert sum(stage.path_share for stage in stages) == pytest.approx(1.0)
    assert sum(stage.cost_share for stage in stages) == pytest.approx(1.0)


def test_of_two_branches_the_slower_is_critical_as_often_as_it_is_slower(model_of):
    problem = Problem.of(model_of("diamonds", 4, seed=3, noise=0.3).tables(500, np.random.default_rng(1)))
    choice = (2, 2, 2, 2)
    by_name = {stage.stage: stage for stage in criticality(problem, choice)}
    own = {s.name: s.latency[problem.upstream_row(i, choice), choice[i]] for i, s in enumerate(problem.stages)}
    assert by_name["s1"].probability == pytest.approx(np.mean(own["s1"] >= own["s2"]))
    assert by_name["s1"].probability + by_name["s2"].probability == pytest.approx(1.0)


def test_a_stage_is_sized_so_because_one_smaller_breaks_the_bound(model_of):
    model = model_of("chain", 3, seed=1)
    plan = make_plan(model, Latency(14.0), **FEW)
    explanation = explain(model, plan, samples=800)
    assert [reason.criticality.stage for reason in explanation.stages] == ["s0", "s1", "s2"]
    assert explanation.price_of_second > 0
    for reason in explanation.stages:
        assert reason.option == plan[reason.criticality.stage].option
        assert reason.best is None or reason.best.cost_change_usd >= -1e-12 or not reason.best.keeps_bounds
        if reason.cheaper is not None:
            assert reason.cheaper.cost_change_usd < 0
            assert "would save $" in reason.why


def test_a_budget_plan_says_how_many_seconds_a_dollar_buys(model_of):
    model = model_of("chain", 3, seed=2)
    cost = make_plan(model, Latency(14.0), **FEW).predicted.cost_usd.p95
    explanation = explain(model, make_plan(model, Budget(cost), **FEW), samples=800)
    assert explanation.price_of_second is None
    assert explanation.seconds_per_dollar > 0


def test_a_plan_off_the_menu_or_with_a_stage_missing_is_refused(model_of):
    model = model_of("chain", 2)
    plan = make_plan(model, Latency(60.0), **FEW)
    with pytest.raises(InvalidPlan, match="s0"):
        explain(model, plan.with_stage("s0", size=Size(3.5, 100)), samples=100)
    bigger = model_of("chain", 3)
    with pytest.raises(InvalidPlan, match="s2"):
        explain(bigger, plan, samples=100)

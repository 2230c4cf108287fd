from __future__ import annotations

import numpy as np
import pytest

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.objective import Budget, Latency
from prefect_slo.planner import make_plan
from prefect_slo.planner.baselines import all_max, all_min, uniform
from prefect_slo.resources import Capacity, Size


def test_extremes_take_the_ends_of_every_menu(model_of):
    model = model_of("diamonds", 4)
    low, high = all_min(model, Latency(10.0)), all_max(model, Latency(10.0))
    assert {(s.workers, s.size) for s in low.stages.values()} == {(1, Size(1, 1024))}
    assert {(s.workers, s.size) for s in high.stages.values()} == {(4, Size(2, 2048))}
    assert low.certificate is None
    assert low.predicted.latency_s.mean > high.predicted.latency_s.mean


def test_all_max_stops_at_the_capacity(model_of):
    model = model_of("sources", 4, capacity=Capacity(vcpus=9))
    plan = all_max(model, Latency(10.0))
    sources = [plan[s.name] for s in model.workflow.stages if not s.after]
    assert sum(s.workers * s.size.vcpus for s in sources) <= 9
    with pytest.raises(InfeasibleSlo):
        all_min(model_of("chain", 2, capacity=Capacity(memory_mb=100)), Latency(10.0))


def test_uniform_gives_all_stages_one_setting_that_keeps_the_bound_where_one_does(model_of):
    model = model_of("chain", 4, seed=5)
    plan = uniform(model, Latency(30.0))
    assert len({(s.workers, s.size) for s in plan.stages.values()}) == 1
    assert plan.predicted.latency_s.p95 <= 30.0 * 1.01
    hopeless = uniform(model, Latency(0.01))
    assert hopeless.predicted.latency_s.p95 <= plan.predicted.latency_s.p95


@pytest.mark.parametrize("seed", range(3))
def test_no_baseline_keeps_the_bound_for_less(model_of, seed):
    model = model_of("diamonds", 4, seed=seed)
    bound = Latency(1.05 * uniform(model, Latency(25.0)).predicted.latency_s.p95)
    ours = make_plan(model, bound, samples=1000, certify_samples=20_000)
    for baseline in (all_min, all_max, uniform):
        plan = baseline(model, bound)
        if plan.predicted.latency_s.p95 <= 0.99 * bound.bound_s:
            assert ours.predicted.cost_usd.mean <= plan.predicted.cost_usd.mean * 1.005


def test_a_budget_is_an_objective_too(model_of):
    model = model_of("chain", 3)
    budget = Budget(1.01 * all_min(model, Latency(9.0)).predicted.cost_usd.p95)
    assert np.isfinite(uniform(model, budget).predicted.latency_s.p95)

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from prefect_slo.planner.pareto import front, pareto
from prefect_slo.planner.problem import Goal, Problem, percentile


@pytest.mark.parametrize("shape", ["chain", "diamonds", "sources"])
def test_no_point_is_slower_and_dearer_than_another(model_of, shape):
    points = pareto(model_of(shape, 4, seed=2), points=8, samples=500)
    assert len(points) >= 4
    assert all(a.latency_s < b.latency_s and a.cost_usd > b.cost_usd for a, b in pairwise(points))
    assert all(0 < point.lower_bound_usd <= point.cost_usd for point in points)


def test_every_point_is_on_the_front_of_all_plans(model_of):
    problem = Problem.of(model_of("diamonds", 4, seed=3).tables(200, np.random.default_rng(0)))
    allowed = Goal().allowed(200)
    plans = [(percentile(problem.latency(c), allowed), problem.mean_cost(c)) for c in problem.choices()]
    points = front(problem, 0.95, 8, node_limit=5000)
    for point in points:
        cheapest = min(cost for latency, cost in plans if latency <= point.latency_s * (1 + 1e-6))
        assert point.cost_usd == pytest.approx(cheapest, rel=1e-5)
    assert points[0].latency_s == pytest.approx(min(latency for latency, _ in plans), rel=1e-6)
    assert points[-1].cost_usd == pytest.approx(min(cost for _, cost in plans), rel=1e-6)


def test_the_same_seed_gives_the_same_front(model_of):
    model = model_of("chain", 3, seed=4)
    assert pareto(model, points=5, samples=300) == pareto(model, points=5, samples=300)

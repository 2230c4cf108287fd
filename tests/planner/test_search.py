from __future__ import annotations

from math import inf

import numpy as np
import pytest

from prefect_slo.planner.incumbent import begin
from prefect_slo.planner.problem import ROUNDING, Goal, Problem, percentile
from prefect_slo.planner.search import search
from prefect_slo.resources import Capacity

SHAPES = ("chain", "diamonds", "sources", "random")


def instance(model_of, seed: int, samples: int = 200) -> Problem:
    """A random problem of up to four stages: graphs, couplings, item edges, noises and capacities all vary."""
    rng = np.random.default_rng(seed)
    model = model_of(
        SHAPES[seed % 4],
        int(rng.integers(1, 5)),
        seed=seed,
        item=0.5 if seed % 3 == 0 else 0.0,
        own_noise=0.1 if seed % 2 else 0.0,
        noise=float(rng.uniform(0.02, 0.3)),
        capacity=Capacity(vcpus=float(rng.integers(4, 12))) if seed % 5 == 0 else None,
    )
    return Problem.of(model.tables(samples, rng))


def goals(problem: Problem, rng: np.random.Generator) -> tuple[list[Goal], list[float]]:
    """Goals of every kind around what can just be reached, and their optima by brute force."""
    choices = list(problem.choices())
    allowed = Goal().allowed(problem.n_samples)
    latency = np.array([percentile(problem.latency(choice), allowed) for choice in choices])
    tail_cost = np.array([percentile(problem.cost(choice), allowed) for choice in choices])
    cost = np.array([problem.mean_cost(choice) for choice in choices])
    near = rng.choice([0.999, 1.0001])
    bound, budget = near * np.quantile(latency, rng.uniform(0, 0.6)), near * np.quantile(tail_cost, rng.uniform(0, 0.6))
    asked = [
        Goal(latency_bound_s=bound),
        Goal(cost_bound_usd=budget, cost_weight=0.0, latency_weight=1.0),
        Goal(latency_bound_s=bound, cost_bound_usd=budget),
        Goal(cost_weight=1 / cost.min(), latency_weight=1 / latency.min()),
    ]
    best = []
    for goal in asked:
        kept = (latency <= goal.latency_bound_s * (1 + ROUNDING)) & (tail_cost <= goal.cost_bound_usd * (1 + ROUNDING))
        score = goal.cost_weight * cost + (goal.latency_weight * latency if goal.latency_weight else 0.0)
        best.append(float(np.where(kept, score, inf).min()))
    return asked, best


@pytest.mark.parametrize("seed", range(80))
def test_search_equals_brute_force_for_every_kind_of_goal(model_of, seed):
    problem = instance(model_of, seed)
    for goal, best in zip(*goals(problem, np.random.default_rng(seed)), strict=True):
        first = begin(problem, goal)
        for found in (
            search(problem, goal, incumbent=first.plan, reference=first.reference, node_limit=100_000),
            search(problem, goal, node_limit=100_000),
        ):
            assert found.complete
            assert (found.choice is None) == (best == inf)
            assert found.score == pytest.approx(best, rel=3e-6)

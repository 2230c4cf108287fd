"""Without dominated options a best plan is left, and every plan that is left means the same as in the whole problem."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest

from prefect_slo.planner.dominance import Reduced, undominated
from prefect_slo.planner.problem import Goal, Problem, percentile
from prefect_slo.planner.solver import solve
from prefect_slo.resources import Capacity


def problem_of(model_of, shape="diamonds", n=4, **kwargs) -> Problem:
    return Problem.of(model_of(shape, n, **kwargs).tables(60, np.random.default_rng(0)))


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 12))])
def test_the_best_plan_of_every_goal_stays(model_of, seed):
    problem = problem_of(
        model_of, ("chain", "diamonds", "sources", "random")[seed % 4], seed=seed, workers=(1, 3), vcpus=(1, 2, 3),
        own_noise=0.2 if seed % 3 == 0 else 0.0, item=0.5 if seed % 3 == 1 else 0.0,
        capacity=Capacity(vcpus=9.0) if seed % 2 else None,
    )  # fmt: skip
    choices = list(problem.choices())
    latency = [percentile(problem.latency(choice), 3) for choice in choices]
    cost = [percentile(problem.cost(choice), 3) for choice in choices]
    goals = [
        Goal(latency_bound_s=float(np.quantile(latency, 0.2))),
        Goal(cost_bound_usd=float(np.quantile(cost, 0.3)), cost_weight=0.0, latency_weight=1.0),
        Goal(cost_weight=1000.0, latency_weight=0.2),
    ]
    for goal in goals:
        reduced = Reduced.of(problem, goal)
        best = min(problem.score(choice, goal) for choice in choices)
        left = min((reduced.problem.score(c, goal) for c in reduced.problem.choices()), default=inf)
        assert left == pytest.approx(best, rel=1e-6)


def test_choices_translate_both_ways(model_of):
    problem = problem_of(model_of, seed=3, coupled=1.0)
    reduced = Reduced.of(problem, Goal())
    assert sum(len(kept) for kept in reduced.kept) < sum(len(stage.options) for stage in problem.stages)
    for choice in reduced.problem.choices():
        whole = reduced.whole(choice)
        assert reduced.within(whole) == choice
        np.testing.assert_allclose(problem.latency(whole), reduced.problem.latency(choice))
        np.testing.assert_allclose(problem.cost(whole), reduced.problem.cost(choice))
    gone = next(i for i, kept in enumerate(reduced.kept) if len(kept) < len(problem.stages[i].options))
    lost = next(o for o in range(len(problem.stages[gone].options)) if o not in reduced.kept[gone])
    assert reduced.within([lost if i == gone else int(kept[0]) for i, kept in enumerate(reduced.kept)]) is None


def test_of_options_that_are_equal_one_stays(model_of):
    problem = problem_of(model_of, "chain", 2, coupled=0.0)
    stages = tuple(
        replace(
            s, latency=np.ones_like(s.latency), cost=np.ones_like(s.cost), mean_cost=np.ones_like(s.mean_cost)
        )
        for s in problem.stages
    )  # fmt: skip
    assert [int(mask.sum()) for mask in undominated(replace(problem, stages=stages), Goal())] == [1, 1]


def test_workers_that_help_downstream_are_not_given_up(model_of):
    problem = problem_of(model_of, "chain", 2, coupled=1.0, seed=1)
    child = problem.stages[1]
    assert child.upstream
    falling = replace(child, latency=child.latency[::-1].copy())
    changed = replace(problem, stages=(problem.stages[0], falling))
    few, all_counts = (undominated(p, Goal())[0] for p in (problem, changed))
    assert set(problem.stages[0].workers[all_counts]) == set(problem.stages[0].workers)
    assert few.sum() <= all_counts.sum()


def test_where_nothing_is_allowed_nothing_changes(model_of):
    problem = problem_of(model_of, "chain", 3)
    closed = replace(problem, allowed=(np.zeros(6, dtype=bool), *problem.allowed[1:]))
    assert Reduced.of(closed, Goal()).problem is closed
    assert solve(closed, Goal()).choice is None

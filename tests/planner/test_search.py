"""The search against brute force that shares no code with it: every plan, float64, by the definition of makespan."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from math import inf

import numpy as np
import pytest

from prefect_slo.models.makespan import makespan
from prefect_slo.models.tables import SampleTables
from prefect_slo.planner.incumbent import begin
from prefect_slo.planner.problem import Goal, Problem
from prefect_slo.planner.search import search
from prefect_slo.planner.solver import solve
from prefect_slo.resources import Capacity

SHAPES = ("chain", "diamonds", "sources", "random")
SAMPLES = 200


def instance(model_of, seed: int) -> SampleTables:
    """Tables of one to six stages: graphs, couplings, item edges, branches, noises and capacities all vary."""
    rng = np.random.default_rng(seed)
    n = 1 + seed % 6
    model = model_of(
        SHAPES[seed // 6 % 4],
        n,
        seed=seed,
        workers=(1, 2, 4) if n <= 4 else (1, 3),
        item=0.5 if seed % 3 == 0 else 0.0,
        own_noise=0.1 if seed % 2 else 0.0,
        noise=float(rng.uniform(0.02, 0.3)),
        capacity=Capacity(vcpus=float(rng.integers(5, 12)), workers=9) if seed % 5 == 0 else None,
    )
    if seed % 4 == 1:  # branches that are not always taken
        stages = tuple(replace(stage, probability=0.6) if stage.after else stage for stage in model.workflow.stages)
        model = replace(model, workflow=replace(model.workflow, stages=stages))
    return model.tables(SAMPLES, rng)


class BruteForce:
    """Latency, tail cost and mean cost of every plan that fits."""

    def __init__(self, tables: SampleTables) -> None:
        self.tables, flow = tables, tables.workflow
        options = [tables.stages[name].options for name in flow.order]
        choices = [c for c in product(*(range(len(o)) for o in options)) if self._fits(c, options)]
        self.choices = np.array(choices, dtype=int).reshape(-1, len(options))
        latency, cost, waves = {}, {}, {}
        position = {name: i for i, name in enumerate(flow.order)}
        for name in flow.order:
            table, pick = tables.stages[name], self.choices[:, position[name]]
            parents = [position[p] for p in flow[name].parents]
            sums = sum((np.array([o.workers for o in options[p]])[self.choices[:, p]] for p in parents), 0 * pick)
            rows = np.array([table.at(int(u)) for u in sums], dtype=int)
            latency[name] = table.latency_s[rows, pick].astype(float)
            cost[name] = table.cost_usd[rows, pick].astype(float)
            waves[name] = table.waves[pick, None].astype(float)
        rank = SAMPLES - 1 - SAMPLES // 20
        total = makespan(flow, latency, waves=waves, driver_s=tables.driver_s.astype(float))
        self.latency = np.sort(total, axis=1)[:, rank]
        self.tail_cost = np.sort(sum(cost.values()), axis=1)[:, rank]
        self.cost = sum(cost.values()).mean(axis=1)

    def best(self, goal: Goal) -> float:
        """Score of the best plan, infinite when none keeps the bounds."""
        kept = (self.latency <= goal.latency_bound_s) & (self.tail_cost <= goal.cost_bound_usd)
        return float(np.where(kept, goal.cost_weight * self.cost + goal.latency_weight * self.latency, inf).min())

    def _fits(self, choice: tuple[int, ...], options) -> bool:
        flow = self.tables.workflow
        if flow.capacity == Capacity():
            return True
        waits: dict[str, set[str]] = {}
        reach: dict[str, set[str]] = {}
        for name in flow.order:
            reach[name] = {name}.union(*(reach[p] for p in flow[name].parents))
            waits[name] = set().union(*(waits[e.parent] | (reach[e.parent] if e.kind == "all" else set())
                                        for e in flow[name].after))  # fmt: skip
        chosen = {name: options[i][choice[i]] for i, name in enumerate(flow.order)}
        return all(
            flow.capacity.fits(*(chosen[name] for name in some))
            for size in range(1, len(chosen) + 1)
            for some in combinations(flow.order, size)
            if not any(a in waits[b] or b in waits[a] for a, b in combinations(some, 2))
        )


def goals(oracle: BruteForce, rng: np.random.Generator) -> list[Goal]:
    """Goals of every kind, their bounds just within or just out of reach of some plan."""
    near = rng.choice([0.999, 1.0001])
    bound = float(near * rng.choice(np.sort(oracle.latency)[: len(oracle.latency) // 2 + 1]))
    budget = float(near * rng.choice(np.sort(oracle.tail_cost)[: len(oracle.tail_cost) // 2 + 1]))
    return [
        Goal(latency_bound_s=bound),
        Goal(cost_bound_usd=budget, cost_weight=0.0, latency_weight=1.0),
        Goal(latency_bound_s=bound, cost_bound_usd=budget),
        Goal(cost_weight=1 / oracle.cost.min(), latency_weight=1 / oracle.latency.min()),
    ]


SEEDS = [*range(48), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(48, 336))]


@pytest.mark.parametrize("seed", SEEDS)
def test_search_equals_brute_force_for_every_kind_of_goal(model_of, seed):
    tables = instance(model_of, seed)
    oracle, problem = BruteForce(tables), Problem.of(tables)
    if not len(oracle.choices):
        assert begin(problem, Goal()).reference is None
        assert search(problem, Goal(), node_limit=100_000).choice is None
        return
    for goal in goals(oracle, np.random.default_rng(seed)):
        best = oracle.best(goal)
        for found in (search(problem, goal, node_limit=100_000), solve(problem, goal, 100_000)):
            assert found.complete
            assert (found.choice is None) == (best == inf)
            assert found.score == pytest.approx(best, rel=3e-6)


@pytest.mark.parametrize("seed", range(6, 24, 3))
def test_cut_short_it_still_tells_the_truth(model_of, seed):
    tables = instance(model_of, seed)
    oracle, problem = BruteForce(tables), Problem.of(tables)
    for goal in goals(oracle, np.random.default_rng(seed)):
        best = oracle.best(goal)
        for limit in (1, 3, 9):
            found = search(problem, goal, node_limit=limit)
            assert found.lower_bound <= best * (1 + 3e-6)
            assert found.score >= best * (1 - 3e-6)
            assert found.nodes <= limit


def test_more_nodes_never_bring_a_worse_plan(model_of):
    problem = Problem.of(model_of("diamonds", 6, seed=3).tables(300, np.random.default_rng(3)))
    goal = Goal(latency_bound_s=18.0)
    scores = [search(problem, goal, node_limit=limit).score for limit in (4, 16, 64, 256)]
    assert scores == sorted(scores, reverse=True)


def test_a_plan_that_breaks_its_bound_is_not_believed(model_of):
    problem = Problem.of(model_of("chain", 3, seed=4).tables(200, np.random.default_rng(4)))
    slowest = min(problem.choices(), key=problem.mean_cost)
    goal = Goal(latency_bound_s=0.9 * float(np.quantile(problem.latency(slowest), 0.95)))
    found = search(problem, goal, incumbent=slowest)
    assert found.choice != slowest
    assert problem.score(found.choice, goal) == found.score

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from prefect_slo.planner.capacity import Antichains, max_weight_antichain
from prefect_slo.planner.problem import Goal, Problem
from prefect_slo.planner.search import search
from prefect_slo.resources import Capacity, Menu, Size
from prefect_slo.workflow import Constraint, Edge, Stage, Workflow

MENU = Menu("local", (1, 2, 4), (Size(1, 1024), Size(2, 2048)))


def workflow(edges: dict[str, list[tuple[str, str]]], **limits: float) -> Workflow:
    stages = tuple(Stage(n, tuple(Edge(p, k) for p, k in after), MENU) for n, after in edges.items())
    return Workflow("w", stages, capacity=Capacity(**limits))


@pytest.mark.parametrize("seed", range(30))
def test_heaviest_antichain_equals_enumeration(seed):
    rng = np.random.default_rng(seed)
    n = 6
    direct = {(i, j) for i in range(n) for j in range(i + 1, n) if rng.random() < 0.35}
    closure = set(direct)
    for k in range(n):
        closure |= {(i, j) for i in range(n) for j in range(n) if (i, k) in closure and (k, j) in closure}
    weights = rng.integers(1, 9, n).tolist()
    best = max(
        sum(weights[i] for i in some)
        for size in range(1, n + 1)
        for some in combinations(range(n), size)
        if not any(pair in closure for pair in combinations(some, 2))
    )
    found = max_weight_antichain(weights, frozenset(closure))
    assert sum(weights[i] for i in found) == best
    assert not any(pair in closure for pair in combinations(found, 2))


def test_parallel_stages_share_the_capacity_and_serial_ones_do_not():
    fork = workflow({"a": [], "b": [("a", "all")], "c": [("a", "all")]}, vcpus=6)
    limits = Antichains.of(fork, [MENU.options()] * 3)
    at = {(o.workers, o.size.vcpus): i for i, o in enumerate(MENU.options())}
    assert limits.admit([at[2, 2], at[2, 1], at[4, 1]])
    assert not limits.admit([at[1, 1], at[4, 1], at[4, 1]])
    assert not limits.admit([at[4, 2], at[1, 1], at[1, 1]])


def test_item_edges_let_parent_and_child_overlap_but_not_past_a_barrier():
    piped = workflow({"a": [], "b": [("a", "item")], "c": [("b", "all")]}, workers=4)
    limits = Antichains.of(piped, [MENU.options()] * 3)
    at = {(o.workers, o.size.vcpus): i for i, o in enumerate(MENU.options())}
    assert limits.admit([at[2, 1], at[2, 1], at[4, 1]])
    assert not limits.admit([at[4, 1], at[1, 1], at[1, 1]])


def test_wide_graphs_are_searched_without_listing_their_antichains(model_of):
    model = model_of("random", 3, seed=1)
    names = [f"p{i}{j}" for i in range(4) for j in range(6)]
    stages = tuple(Stage(n, (Edge(f"p{n[1]}{int(n[2]) - 1}"),) if n[2] != "0" else (), MENU) for n in names)
    wide = type(model)(
        Workflow("wide", stages, capacity=Capacity(vcpus=8)),
        fixed=dict.fromkeys(names, 0.1), work=dict.fromkeys(names, 2.0), power=dict.fromkeys(names, 0.9),
        upstream=dict.fromkeys(names, 0.0),
    )  # fmt: skip
    problem = Problem.of(wide.tables(200, np.random.default_rng(0)))
    found = search(problem, Goal(latency_bound_s=20.0), node_limit=300)
    assert found.choice is not None
    held = [problem.antichains.needs[i][o][0] for i, o in enumerate(found.choice)]
    assert sum(held[i] for i in max_weight_antichain(held, problem.antichains.order)) <= 8


def test_relations_between_stages_hold_in_every_plan_found(model_of):
    model = model_of("chain", 3, seed=2)
    rules = (Constraint.parse("s2.workers <= s0.workers"), Constraint.parse("s1.vcpus == 1"))
    bound = type(model)(
        Workflow("w", model.workflow.stages, constraints=rules),
        model.fixed, model.work, model.power, model.upstream,
    )  # fmt: skip
    problem = Problem.of(bound.tables(200, np.random.default_rng(0)))
    choices = list(problem.choices())
    assert all(c.holds(problem.option(choice)) for choice in choices for c in rules)
    for goal in (Goal(), Goal(cost_weight=0.0, latency_weight=1.0)):
        best = min(problem.score(choice, goal) for choice in choices)
        assert search(problem, goal, node_limit=10_000).score == pytest.approx(best, rel=3e-6)

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from prefect_slo.errors import GpuShareTooLarge
from prefect_slo.placement import Device
from prefect_slo.planner.capacity import Antichains
from prefect_slo.planner.overlap import max_weight_antichain
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


ONE, TWO = (Device("0", 16_384),), (Device("0", 16_384), Device("1", 16_384))
SHARES = Menu("local", (1, 2, 4), tuple(Size(1, 1024, gpu, "gpu") for gpu in (0.25, 0.5, 0.75)))


def with_gpus(edges: dict[str, list[tuple[str, str]]], devices: tuple[Device, ...]) -> tuple[Antichains, dict]:
    stages = tuple(Stage(n, tuple(Edge(p, k) for p, k in after), SHARES) for n, after in edges.items())
    held = Workflow("w", stages, capacity=Capacity(gpu_devices=devices))
    at = {(option.workers, option.size.gpu): i for i, option in enumerate(SHARES.options())}
    return Antichains.of(held, [SHARES.options()] * len(stages)), at


def test_stages_one_after_another_take_the_peak_of_a_gpu_and_not_the_sum():
    chain, at = with_gpus({"a": [], "b": [("a", "all")], "c": [("b", "all")]}, ONE)
    assert chain.admit([at[4, 0.25], at[2, 0.5], at[1, 0.75]])
    fork, at = with_gpus({"a": [], "b": [], "c": [("b", "all")]}, ONE)
    assert fork.admit([at[2, 0.25], at[1, 0.5], at[2, 0.25]])
    assert not fork.admit([at[2, 0.25], at[1, 0.75], at[1, 0.25]])


def test_shares_that_fit_in_sum_and_on_no_device_are_not_admitted():
    side_by_side, at = with_gpus({"a": [], "b": []}, TWO)
    assert side_by_side.admit([at[2, 0.75], at[2, 0.25]])
    assert not side_by_side.admit([at[2, 0.75], at[1, 0.5]]), "0.75, 0.75 and 0.5 add up to two devices and fit none"


def test_an_option_that_could_not_be_placed_alone_is_not_tried():
    stage, at = with_gpus({"a": []}, ONE)
    assert stage.placing is not None
    (alone,) = stage.placing.alone
    assert alone[at[4, 0.25]]
    assert alone[at[1, 0.75]]
    assert not alone[at[2, 0.75]]
    assert not alone[at[4, 0.5]]


def test_fewer_workers_with_larger_shares_are_not_taken_to_be_as_easily_placed():
    stage, at = with_gpus({"a": []}, TWO)
    easier = stage.easier(0)
    assert easier[at[2, 0.25], at[4, 0.25]]
    assert easier[at[2, 0.25], at[2, 0.5]]
    assert not easier[at[1, 0.75], at[4, 0.25]], "less in sum, and it needs one device with three quarters free"


def test_where_there_is_no_gpu_none_is_taken():
    nothing, at = with_gpus({"a": []}, ())
    assert not nothing.admit([at[1, 0.25]])
    unknown, at = with_gpus({"a": []}, None)
    assert unknown.admit([at[4, 0.75]])


@pytest.mark.parametrize("devices", [(), ONE])
def test_a_stage_that_asks_for_more_than_there_is_is_refused_by_name(model_of, devices):
    model = model_of("chain", 2)
    menu = Menu("local", (2,), (Size(1, 1024, 0.75, "gpu"),))
    stages = tuple(replace(stage, menu=menu) for stage in model.workflow.stages)
    asking = type(model)(
        Workflow("w", stages, capacity=Capacity(gpu_devices=devices)),
        model.fixed, model.work, model.power, model.upstream,
    )  # fmt: skip
    with pytest.raises(GpuShareTooLarge, match=r"stage 's0' asks for 2 × 0.75 GPU"):
        Problem.of(asking.tables(50, np.random.default_rng(0)))

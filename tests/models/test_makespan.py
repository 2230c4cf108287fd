"""Longest paths against closed forms, path listing and a discrete-event simulation."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.models.makespan import makespan, stages_run
from prefect_slo.workflow import Edge, Stage, Workflow, chain


@st.composite
def _graphs(draw: st.DrawFn) -> Workflow:
    n = draw(st.integers(1, 7))
    return Workflow(
        "random",
        tuple(Stage(f"s{k}", tuple(Edge(f"s{p}") for p in range(k) if draw(st.booleans()))) for k in range(n)),
    )


@given(_graphs(), st.integers(0, 1000))
def test_it_equals_the_longest_of_all_listed_paths(workflow: Workflow, seed: int) -> None:
    rng = np.random.default_rng(seed)
    latency = {stage.name: rng.exponential(size=3) for stage in workflow.stages}
    sinks = [name for name in workflow.order if not workflow.children(name)]
    paths = [
        path
        for source in workflow.order
        if not workflow[source].after
        for sink in sinks
        for path in ([[source]] if source == sink else nx.all_simple_paths(workflow.graph, source, sink))
    ]
    listed = np.max([sum(latency[name] for name in path) for path in paths], axis=0)
    np.testing.assert_allclose(makespan(workflow, latency), listed)


def test_twenty_five_diamonds_in_a_row_take_no_time_to_solve() -> None:
    stages = [Stage("j0")]
    for k in range(25):
        stages += [Stage(f"{side}{k}", (Edge(f"j{k}"),)) for side in "lr"]
        stages.append(Stage(f"j{k + 1}", (Edge(f"l{k}"), Edge(f"r{k}"))))
    workflow = Workflow("diamonds", tuple(stages))
    assert makespan(workflow, {s.name: np.ones(2) for s in stages}).tolist() == [51.0, 51.0]


def test_the_driver_is_added_once() -> None:
    workflow = Workflow("two", chain("a", "b"))
    assert makespan(workflow, {"a": np.array([1.0]), "b": np.array([2.0])}, driver_s=0.5)[0] == 3.5


def test_item_edges_overlap_stages_but_never_beat_the_bottleneck() -> None:
    workflow = Workflow("pipe", chain("a", "b", kind="item"))
    latency = {"a": np.array([10.0]), "b": np.array([4.0])}
    pipelined = makespan(workflow, latency, waves={"a": 10.0, "b": 10.0})[0]
    assert pipelined == pytest.approx(10.4)
    assert makespan(workflow, latency)[0] == 14.0


def _simulate(
    counts: list[int], seconds: list[float], workers: list[int], sigma: float, seed: int, start_s: float = 0.0
) -> float:
    """Wave-free truth: workers of each stage start with its first item, and pull items as they get ready and free."""
    rng = np.random.default_rng(seed)
    env = simpy.Environment()
    pools = [simpy.Resource(env, capacity) for capacity in workers]
    up: list[float | None] = [None] * len(workers)
    ends: list[float] = []

    def item(times: np.ndarray):
        for k, (pool, duration) in enumerate(zip(pools, times, strict=True)):
            with pool.request() as turn:
                yield turn
                up[k] = ready = env.now + start_s if up[k] is None else up[k]
                yield env.timeout(max(ready - env.now, 0.0) + float(duration))
        ends.append(env.now)

    for _ in range(counts[0]):
        env.process(item(np.array(seconds) * np.exp(sigma * rng.standard_normal(len(seconds)))))
    env.run()
    return max(ends)


@pytest.mark.parametrize("workers", [(2, 2, 2), (4, 1, 4), (1, 4, 2), (8, 2, 4)])
@pytest.mark.parametrize("seconds", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.5), (0.5, 1.0, 3.0), (1.0, 4.0, 1.0)])
@pytest.mark.parametrize(("sigma", "most"), [(0.0, 0.05), (0.3, 0.12)])
def test_pipelines_of_items_agree_with_a_discrete_event_simulation(
    workers: tuple[int, ...], seconds: tuple[float, ...], sigma: float, most: float
) -> None:
    items = 48
    names = ("a", "b", "c")
    workflow = Workflow("pipe", chain(*names, kind="item"))
    waves = {name: float(-(-items // d)) for name, d in zip(names, workers, strict=True)}
    spread = float(np.exp(sigma**2 / 2))
    for start_s in (0.0, 8.0):
        latency = {n: np.array([start_s + waves[n] * s * spread]) for n, s in zip(names, seconds, strict=True)}
        predicted = float(makespan(workflow, latency, waves=waves, start_s=dict.fromkeys(names, start_s))[0])
        runs = [_simulate([items], list(seconds), list(workers), sigma, seed, start_s) for seed in range(5)]
        assert predicted == pytest.approx(np.mean(runs), rel=most)


@given(st.integers(0, 1000))
def test_a_stage_is_skipped_with_all_its_parents_only(seed: int) -> None:
    workflow = Workflow(
        "fork", (Stage("a"), Stage("b", (Edge("a"),)), Stage("c", (Edge("a"),)), Stage("d", (Edge("b"), Edge("c"))))
    )
    rng = np.random.default_rng(seed)
    uniforms = {name: rng.random(200) for name in workflow.order}
    ran = stages_run(workflow, {"a": 1.0, "b": 0.5, "c": 0.3, "d": 1.0}, uniforms)
    np.testing.assert_array_equal(ran["d"], ran["b"] | ran["c"])
    assert ran["a"].all()


def test_branch_chances_are_met() -> None:
    workflow = Workflow("two", chain("a", "b"))
    rng = np.random.default_rng(0)
    ran = stages_run(workflow, {"a": 0.5, "b": 0.5}, {name: rng.random(40_000) for name in "ab"})
    assert ran["b"].mean() == pytest.approx(0.25, abs=0.01)
    assert all(not (later & ~earlier).any() for earlier, later in pairwise([ran["a"], ran["b"]]))

"""How data passes: against brute force over every place and method, and crossovers against their closed form."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise, product

import pytest

from prefect_slo.errors import InvalidValue
from prefect_slo.resources import Size
from prefect_slo.transform import DataStage, Links, Transfer, best_passing, direct_until, slots_of
from prefect_slo.transform.passing import costs_of, methods_of

LINKS = Links(direct_mb_s=100, up_mb_s=80, down_mb_s=90, inline_mb_s=50, remote_s=0.02, inline_s=0.005)


def brute_force(stages, transfers, links) -> float:
    """Least latency over every place of every stage and every method of every edge, by paths listed one by one."""
    names, best = [stage.name for stage in stages], float("inf")
    by_name = {stage.name: stage for stage in stages}
    children = {name: [edge for edge in transfers if edge.source == name] for name in names}
    roots = [name for name in names if all(edge.sink != name for edge in transfers)]
    for chosen in product(*(stage.places for stage in stages)):
        places = dict(zip(names, chosen, strict=True))
        ways = [
            list(methods_of(by_name[e.source], by_name[e.sink], e, links, (places[e.source], places[e.sink])).items())
            for e in transfers
        ]
        for methods in product(*ways):
            seconds = {(e.source, e.sink): took for e, (_, took) in zip(transfers, methods, strict=True)}

            def longest(name: str, seconds=seconds, places=places) -> float:
                rest = [seconds[e.source, e.sink] + longest(e.sink, seconds, places) for e in children[name]]
                return by_name[name].time_s(places[name]) + max(rest, default=0.0)

            best = min(best, max(longest(root) for root in roots))
    return best


def population(
    rng: random.Random, graph: list[tuple[int, int]], n: int
) -> tuple[list[DataStage], list[Transfer], Links]:
    stages = [
        DataStage(
            f"s{i}",
            rng.choice([1, 2, 4, 8, 32]),
            rng.uniform(0.05, 5),
            rng.choice([1, 2, 4, 8]),
            rng.choice([1.0, 0.4]),
        )
        for i in range(n)
    ]
    edges = [Transfer(f"s{a}", f"s{b}", rng.choice([0.1, 5, 50, 500]), rng.random() < 0.5) for a, b in graph]
    links = Links(
        rng.uniform(10, 1000), rng.uniform(20, 100), rng.uniform(20, 100), rng.uniform(10, 200),
        rng.uniform(0, 0.01), rng.uniform(0, 0.1), rng.uniform(0, 0.02),
    )  # fmt: skip
    return stages, edges, links


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_on_chains_it_is_the_best_of_all(n: int) -> None:
    rng = random.Random(n)
    for _ in range(12 if n < 5 else 3):
        stages, edges, links = population(rng, list(pairwise(range(n))), n)
        found = best_passing(stages, edges, links)
        assert found.latency_s == pytest.approx(brute_force(stages, edges, links))


@pytest.mark.parametrize(
    "graph",
    [
        [(0, 1), (0, 2), (1, 3), (2, 3)],
        [(0, 1), (0, 2), (0, 3)],
        [(0, 2), (1, 2), (2, 3)],
        [(0, 1), (1, 2), (0, 2)],
        [(0, 1), (2, 3)],
    ],
)
def test_on_small_graphs_it_is_the_best_of_all(graph) -> None:
    rng = random.Random(len(graph))
    n = 1 + max(max(edge) for edge in graph)
    for _ in range(8):
        stages, edges, links = population(rng, graph, n)
        assert best_passing(stages, edges, links).latency_s == pytest.approx(brute_force(stages, edges, links))


def random_graph(rng: random.Random, n: int, edges: int) -> list[tuple[int, int]]:
    """A connected graph of ``n`` stages in topological order."""
    graph = {(rng.randrange(b), b) for b in range(1, n)}
    while len(graph) < edges:
        a, b = sorted(rng.sample(range(n), 2))
        graph.add((a, b))
    return sorted(graph)


@pytest.mark.parametrize("seed", range(3))
def test_on_graphs_of_six_stages_it_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    stages, edges, links = population(rng, random_graph(rng, 6, 6), 6)
    edges = [replace(edge, ways=("machine", "direct", "remote")) for edge in edges]
    assert best_passing(stages, edges, links).latency_s == pytest.approx(brute_force(stages, edges, links))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 43))
def test_on_many_graphs_of_six_stages_it_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    stages, edges, links = population(rng, random_graph(rng, 6, rng.choice([5, 6, 7])), 6)
    assert best_passing(stages, edges, links).latency_s == pytest.approx(brute_force(stages, edges, links))


def test_a_machine_holds_as_many_workers_as_it_has_cpu_and_memory_for() -> None:
    machine = Size(8, 16_384)
    assert slots_of(machine, Size(1, 1024)) == 8
    assert slots_of(machine, Size(1, 4096)) == 4
    assert slots_of(machine, Size(3, 4096)) == 2
    assert slots_of(machine, Size(1, 4096), held_mb=9000) == 1, "data lie in the same memory"
    assert slots_of(machine, Size(16, 1024)) == 0


def test_what_fits_on_no_machine_is_spread_and_what_has_its_place_stays_there() -> None:
    links = replace(LINKS, direct_mb_s=1, up_mb_s=1, down_mb_s=1, inline_mb_s=1)
    edge = Transfer("a", "b", 100.0)
    free = best_passing([DataStage("a", 4, 0.1, 4), DataStage("b", 4, 0.1, 4)], [edge], links)
    assert (free.methods["a", "b"], free.places["b"]) == ("machine", "together")
    large = best_passing([DataStage("a", 4, 0.1, 4), DataStage("b", 4, 0.1, 0)], [edge], links)
    assert large.places["b"] == "spread"
    fixed = best_passing([DataStage("a", 4, 0.1, 4, only="spread"), DataStage("b", 4, 0.1, 4)], [edge], links)
    assert fixed.places["a"] == "spread"
    with pytest.raises(InvalidValue, match="at least 1"):
        DataStage("a", 4, 0.1, 0, only="together")


def test_data_that_memory_does_not_hold_are_not_kept_there() -> None:
    small = replace(LINKS, machine_limit_mb=50.0)
    stages = [DataStage("a", 2, 1.0, 2, only="together"), DataStage("b", 2, 1.0, 2, only="together")]
    assert best_passing(stages, [Transfer("a", "b", 40.0)], small).methods["a", "b"] == "machine"
    assert best_passing(stages, [Transfer("a", "b", 60.0)], small).methods["a", "b"] != "machine"
    with pytest.raises(InvalidValue, match="allow"):
        best_passing(stages, [Transfer("a", "b", 60.0, ways=("machine",))], small)


def test_a_worker_takes_a_broadcast_once_for_each_of_its_calls() -> None:
    edge = Transfer("a", "b", 100.0, True)
    one, many = (
        methods_of(DataStage("a", 1, 1.0), DataStage("b", 4, 1.0, calls=n), edge, LINKS, ("spread", "spread"))
        for n in (4, 40)
    )
    assert many["remote"] - 2 * LINKS.remote_s - 100 / 80 == pytest.approx(10 * (one["remote"] - 0.04 - 100 / 80))


def test_storage_asks_for_its_requests_and_waiting_workers_for_their_time() -> None:
    links = replace(LINKS, put_usd=5e-6, get_usd=4e-7)
    source, sink = DataStage("a", 2, 1.0), DataStage("b", 4, 1.0, usd_s=1e-3)
    edge = Transfer("a", "b", 64.0, True)
    seconds = methods_of(source, sink, edge, links, ("spread", "spread"))
    usd = costs_of(source, sink, edge, links, seconds)
    assert usd["direct"] == pytest.approx(4e-3 * seconds["direct"])
    assert usd["remote"] == pytest.approx(4e-3 * seconds["remote"] + 2 * 4 * 5e-6 + 4 * 8 * 4e-7)


def test_methods_of_the_answer_add_up_to_it() -> None:
    stages, edges, links = population(random.Random(3), list(pairwise(range(6))), 6)
    found = best_passing(stages, edges, links)
    total = sum(found.edge_s.values()) + sum(stage.time_s(found.places[stage.name]) for stage in stages)
    assert found.latency_s == pytest.approx(total)
    assert all(seconds == min(found.alternatives[edge].values()) for edge, seconds in found.edge_s.items())


@pytest.mark.parametrize("direct_mb_s", [50.0, 100.0, 300.0, 900.0])
@pytest.mark.parametrize("size_mb", [6.0, 50.0, 1500.0])
def test_the_crossover_from_direct_to_remote_is_where_the_closed_form_says(direct_mb_s: float, size_mb: float) -> None:
    """Fan-out 1 to 64, one source that broadcasts to spread workers."""
    links = Links(direct_mb_s, 80, 90, 1e-3, remote_s=0.02)
    edge = Transfer("a", "b", size_mb, broadcast=True)
    fastest = []
    for fanout in range(1, 65):
        seconds = methods_of(DataStage("a", 1, 1.0), DataStage("b", fanout, 1.0), edge, links, ("together", "spread"))
        fastest.append("direct" if seconds["direct"] <= seconds["remote"] else "remote")
    seen = fastest.count("direct")
    assert fastest == ["direct"] * seen + ["remote"] * (64 - seen), "it changes once"
    assert abs(seen - min(max(direct_until(edge, links), 0), 64)) <= 1


def test_as_fan_out_grows_it_is_one_machine_then_direct_then_storage() -> None:
    links = Links(direct_mb_s=200, up_mb_s=80, down_mb_s=90, inline_mb_s=1e-3, remote_s=0.05)
    methods = []
    for fanout in range(1, 65):
        stages = [DataStage("make", 1, 1.0, slots=4), DataStage("use", fanout, 0.5, slots=4)]
        methods.append(best_passing(stages, [Transfer("make", "use", 15.0, True)], links).methods["make", "use"])
    assert list(dict.fromkeys(methods)) == ["machine", "direct", "remote"]
    assert methods[:4] == ["machine"] * 4, "as many as there are slots"


def test_small_messages_go_in_the_request_and_large_ones_never() -> None:
    stages = [DataStage("a", 1, 0.1), DataStage("b", 16, 0.1)]
    assert best_passing(stages, [Transfer("a", "b", 0.01)], LINKS).methods["a", "b"] != "remote"
    seconds = methods_of(*stages, Transfer("a", "b", 5.0), LINKS, ("together", "spread"))
    assert "inline" not in seconds
    assert "inline" in methods_of(*stages, Transfer("a", "b", 4.0), LINKS, ("together", "spread"))


def test_what_seldom_happens_weighs_little() -> None:
    rare, sure = (
        best_passing([DataStage("a", 1, 1.0), DataStage("b", 8, 2.0, 2, p)], [Transfer("a", "b", 100.0, True)], LINKS)
        for p in (0.1, 1.0)
    )
    assert rare.latency_s - 1.0 == pytest.approx(0.1 * (sure.latency_s - 1.0))


def test_graphs_that_are_none_are_refused() -> None:
    a, b = DataStage("a", 1, 1.0), DataStage("b", 1, 1.0)
    with pytest.raises(InvalidValue, match="before"):
        best_passing([a, b], [Transfer("b", "a", 1.0)], LINKS)
    with pytest.raises(InvalidValue, match="before"):
        best_passing([a, b], [Transfer("a", "c", 1.0)], LINKS)
    many = [DataStage(f"s{i}", 1, 1.0) for i in range(17)]
    with pytest.raises(InvalidValue, match="at most 16"):
        best_passing(many, [Transfer("s0", f"s{i}", 1.0) for i in range(1, 17)], LINKS)
    with pytest.raises(InvalidValue):
        Links(0, 1, 1, 1)
    with pytest.raises(InvalidValue):
        DataStage("a", 0, 1.0)

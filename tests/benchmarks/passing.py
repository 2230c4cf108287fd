"""How data passes: the methods chosen over fan-out, bandwidth and size, against every other choice tried one by one.

``python tests/benchmarks/passing.py`` sweeps fan-outs 1 to 64 over chains, diamonds and random graphs of up to six
stages and prints how often the choice is the best of all, and how far crossovers are from their closed form.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from prefect_slo.transform import DataStage, Links, Transfer, best_passing, direct_until
from prefect_slo.transform.crossovers import by_fan_out
from prefect_slo.transform.passing import Place, methods_of

SIZES_MB = (0.1, 2.0, 15.0, 200.0, 1500.0)
BANDWIDTHS = (20.0, 60.0, 150.0, 400.0, 1200.0)
FAN_OUTS = tuple(range(1, 65))
GRAPHS = {
    "chain of 3": list(pairwise(range(3))),
    "chain of 6": list(pairwise(range(6))),
    "diamond": [(0, 1), (0, 2), (1, 3), (2, 3)],
    "two joins": [(0, 1), (0, 2), (1, 3), (2, 3), (3, 4), (2, 5), (4, 5)],
}


@dataclass(frozen=True)
class Case:
    """A graph with its sizes and links."""

    stages: list[DataStage]
    edges: list[Transfer]
    links: Links


def case_of(graph: Sequence[tuple[int, int]], fan_out: int, size_mb: float, bandwidth: float, seed: int) -> Case:
    """Stages that take turns at one worker and ``fan_out``; broadcasts out of the single ones."""
    rng = random.Random(seed)
    n = 1 + max(max(edge) for edge in graph)
    stages = [
        DataStage(f"s{i}", 1 if i % 2 == 0 else fan_out, rng.uniform(0.1, 3), rng.choice([0, 2, 8, 64]),
                  rng.choice([1.0, 1.0, 0.3]))
        for i in range(n)
    ]  # fmt: skip
    edges = [Transfer(f"s{a}", f"s{b}", size_mb * rng.uniform(0.5, 2), a % 2 == 0) for a, b in graph]
    links = Links(bandwidth, 85, 85, 100, 0.002, 0.02, 0.003, machine_mb_s=2000, machine_limit_mb=1000)
    return Case(stages, edges, links)


def brute_force(case: Case) -> float:
    """Least latency over all places of all stages and all methods of all edges."""
    by_name = {stage.name: stage for stage in case.stages}
    order = [stage.name for stage in case.stages]
    best = float("inf")
    for chosen in product(*(stage.places for stage in case.stages)):
        places = dict(zip(order, chosen, strict=True))
        own = {name: by_name[name].time_s(places[name]) for name in order}

        def took(e: Transfer, places: dict[str, Place] = places) -> tuple[float, ...]:
            at = places[e.source], places[e.sink]
            return tuple(methods_of(by_name[e.source], by_name[e.sink], e, case.links, at).values())

        for seconds in product(*map(took, case.edges)):
            done: dict[str, float] = {}
            for name in order:
                into = [done[e.source] + s for e, s in zip(case.edges, seconds, strict=True) if e.sink == name]
                done[name] = max(into, default=0.0) + own[name]
            best = min(best, max(done.values()))
    return best


def cases(fan_outs: Sequence[int]) -> Iterator[tuple[str, Case]]:
    for (name, graph), size_mb, bandwidth, fan_out in product(GRAPHS.items(), SIZES_MB, BANDWIDTHS, fan_outs):
        yield name, case_of(graph, fan_out, size_mb, bandwidth, seed=fan_out)


def crossover_errors() -> list[float]:
    """Fan-outs by which the change from direct to remote is off its closed form, where that lies within the sweep."""
    off = []
    for size_mb, bandwidth in product(SIZES_MB, BANDWIDTHS):
        case = case_of([(0, 1)], 1, size_mb, bandwidth, seed=0)
        edge = Transfer("s0", "s1", size_mb, True, ways=("direct", "remote"))
        closed = direct_until(edge, case.links)
        if not 1 <= closed < FAN_OUTS[-1]:
            continue
        found = by_fan_out(
            edge, DataStage("s0", 1, 1.0), DataStage("s1", 1, 1.0), case.links, ("together", "spread"), 64
        )
        [change] = found[1:]
        off.append(abs(change.at - closed))
    return off


def main(fan_outs: Sequence[int]) -> None:
    tried: dict[str, list[bool]] = {}
    chosen: dict[str, int] = {}
    chose_s = forced_s = 0.0
    for name, case in cases(fan_outs):
        begun = time.perf_counter()
        found = best_passing(case.stages, case.edges, case.links)
        middle = time.perf_counter()
        best = brute_force(case)
        chose_s, forced_s = chose_s + middle - begun, forced_s + time.perf_counter() - middle
        tried.setdefault(name, []).append(abs(found.latency_s - best) <= 1e-9 * best)
        for method in found.methods.values():
            chosen[method] = chosen.get(method, 0) + 1
    for name, same in tried.items():
        print(f"{name}: {sum(same)} of {len(same)} are the best of all")
    n = sum(map(len, tried.values()))
    print("methods: " + ", ".join(f"{method} {count}" for method, count in sorted(chosen.items())))
    print(f"choosing took {1000 * chose_s / n:.2f} ms a case, trying all {1000 * forced_s / n:.1f} ms")
    off = crossover_errors()
    print(f"crossovers: {len(off)} within the sweep, at most {max(off):.2f} off their closed form")


if __name__ == "__main__":
    main(FAN_OUTS[:: int(sys.argv[1])] if len(sys.argv) > 1 else FAN_OUTS)

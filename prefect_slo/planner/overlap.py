"""Which stages can overlap: sets of which none waits for every item of another.

Two stages can overlap unless one waits for *every* item of the other, directly or through others: item edges let
parent and child run side by side. "Waits for every item" is a partial order, so sets of stages that can all overlap are
its antichains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import networkx as nx

from prefect_slo.workflow import Workflow

Order = frozenset[tuple[int, int]]
"""Pairs ``(before, after)`` of a transitive order of stages, by their position."""

LISTED = 256
"""Maximal antichains that are listed. Wide graphs have exponentially many."""


def waits(workflow: Workflow) -> Order:
    """Pairs ``(i, j)`` such that *j* starts only when every item of *i* is done."""
    position = {name: i for i, name in enumerate(workflow.order)}
    before: dict[int, set[int]] = {}
    reach: dict[int, set[int]] = {}
    for name in workflow.order:
        at = position[name]
        reach[at], before[at] = set(), set()
        for edge in workflow[name].after:
            parent = position[edge.parent]
            reach[at] |= reach[parent] | {parent}
            before[at] |= before[parent] | (reach[parent] | {parent} if edge.kind == "all" else set())
    return frozenset((i, j) for j, earlier in before.items() for i in earlier)


def antichains(members: Iterable[int], order: Order) -> tuple[list[tuple[int, ...]], bool]:
    """Maximal antichains among some stages, and whether these are all of them."""
    among = sorted(members)
    beside = nx.Graph()
    beside.add_nodes_from(among)
    pairs = ((i, j) for i in among for j in among if j < i)
    beside.add_edges_from(pair for pair in pairs if pair not in order and pair[::-1] not in order)
    found = [tuple(sorted(clique)) for clique in islice(nx.find_cliques(beside), LISTED + 1)]
    return sorted(found[:LISTED]), len(found) <= LISTED


def max_weight_antichain(weights: Sequence[float], order: Order) -> tuple[int, ...]:
    """The antichain of largest weight in a transitive order, by Dilworth's theorem as a minimum cut.

    The least flow that gives every element its weight equals the heaviest antichain. It is found by starting from
    every element on a path of its own (flow Σ weights) and rerouting as much as possible along the order (a maximum
    flow in the bipartite graph before → after); elements on the source side of the cut as "before" but on the sink
    side as "after" form the antichain.
    """
    graph = nx.DiGraph()
    for i, weight in enumerate(weights):
        graph.add_edge("source", ("before", i), capacity=weight)
        graph.add_edge(("after", i), "sink", capacity=weight)
    graph.add_edges_from((("before", i), ("after", j)) for i, j in order)
    _, (near, _) = nx.minimum_cut(graph, "source", "sink")
    return tuple(i for i in range(len(weights)) if ("before", i) in near and ("after", i) not in near)


def heaviest(weights: Sequence[float], order: Order) -> float:
    """The largest weight of an antichain."""
    return sum(weights[i] for i in max_weight_antichain(weights, order))

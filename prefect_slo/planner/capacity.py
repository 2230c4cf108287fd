"""Capacity: stages that can hold workers at the same time must fit together.

Two stages can overlap unless one waits for *every* item of the other, directly or through others: item edges let
parent and child run side by side. "Waits for every item" is a partial order, so sets of stages that can all overlap are
its antichains, and a plan fits when the heaviest antichain does, in every resource. What is counted is the peak of
stages that can overlap, never the sum over a workflow. Shares of GPUs must fit each device by itself, too, which no sum
over devices shows: the workers of an antichain are placed by first-fit-decreasing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from prefect_slo.placement import most_at_once
from prefect_slo.resources import Capacity, Option
from prefect_slo.workflow import Workflow

LISTED = 256
"""Maximal antichains that are listed up front. Wide graphs have exponentially many; the rest are found when broken, as
far as sums go: whether shares of GPUs find their places is checked for those that are listed; others wait."""


@dataclass(eq=False)
class Antichains:
    """Sets of stages that can overlap, and what each option of each stage holds.

    Attributes:
        sets: Antichains as tuples of stage positions; grows as ``admit`` finds others that a choice breaks.
        order: Pairs ``(before, after)`` of the partial order.
        needs: By stage, ``(n_options, n_limits)`` of what its workers hold in all.
        limits: ``(n_limits,)``.
        capacity: What places shares of GPUs on devices, which no sum can tell.
        options: By stage, its options; empty where none takes of a device that is named.
        alone: By stage, which options' workers could be placed if no other stage held anything.
    """

    sets: list[tuple[int, ...]]
    order: frozenset[tuple[int, int]]
    needs: tuple[NDArray[np.float64], ...]
    limits: NDArray[np.float64]
    capacity: Capacity = Capacity()
    options: Sequence[Sequence[Option]] = ()
    alone: tuple[NDArray[np.bool_], ...] = ()

    @classmethod
    def of(cls, workflow: Workflow, options: Sequence[Sequence[Option]]) -> Antichains:
        """The antichains of a workflow whose stages, in topological order, have these options."""
        capacity = workflow.capacity
        limited = capacity.limits()
        limits = np.array(list(limited.values()), dtype=np.float64)
        needs = tuple(np.array([[capacity.held(o, *limit) for limit in limited] for o in stage]) for stage in options)
        if not limited:
            return cls([], frozenset(), needs, limits)
        order = _waits(workflow)
        n = len(options)
        beside = nx.Graph()
        beside.add_nodes_from(range(n))
        pairs = ((i, j) for i in range(n) for j in range(i))
        beside.add_edges_from(pair for pair in pairs if pair not in order and pair[::-1] not in order)
        listed = sorted(tuple(sorted(clique)) for clique in islice(nx.find_cliques(beside), LISTED))
        if all(capacity.devices_of(option) is None for stage in options for option in stage):
            return cls(listed, order, needs, limits)
        alone = tuple(np.array([_placeable(capacity, option) for option in stage]) for stage in options)
        return cls(listed, order, needs, limits, capacity, options, alone)

    def restricted(self, kept: Sequence[NDArray[np.intp]]) -> Antichains:
        """The same for some of every stage's options, by position."""
        return replace(
            self,
            needs=tuple(need[index] for need, index in zip(self.needs, kept, strict=True)),
            options=tuple([own[o] for o in index] for own, index in zip(self.options, kept, strict=False)),
            alone=tuple(own[index] for own, index in zip(self.alone, kept, strict=False)),
        )

    def easier(self, at: int) -> NDArray[np.bool_]:
        """``[a, b]``: whether option *a* of a stage fits wherever *b* does."""
        needs = self.needs[at]
        fits = (needs[:, None, :] <= needs[None, :, :]).all(axis=2)
        if self.options:
            own = self.options[at]
            fits &= np.array([[_as_placeable(self.capacity, a, b) for b in own] for a in own])
        return np.asarray(fits)

    def narrow(self, at: int, choice: Sequence[int], mask: NDArray[np.bool_]) -> None:
        """Clear from ``mask`` the options of a stage that do not fit beside what was chosen for the stages before it.

        Stages after it count with the least that they can hold.
        """
        if not self.limits.size:
            return
        beside = np.zeros_like(self.limits)
        for members in self.sets:
            if at in members:
                held = [self.needs[m][choice[m]] if m < at else self._least(m) for m in members if m != at]
                beside = np.maximum(beside, np.sum(held, axis=0) if held else 0.0)
        mask &= (self.needs[at] + beside <= self.limits * (1 + 1e-9)).all(axis=1)

    def admit(self, choice: Sequence[int]) -> bool:
        """Whether a complete choice fits; an antichain that it breaks is remembered."""
        for resource, limit in enumerate(self.limits):
            held = [self.needs[i][o][resource] for i, o in enumerate(choice)]
            if sum(held) <= limit * (1 + 1e-9):
                continue
            heaviest = max_weight_antichain(held, self.order)
            if sum(held[i] for i in heaviest) > limit * (1 + 1e-9):
                if heaviest not in self.sets:
                    self.sets.append(heaviest)
                return False
        return self._placed(choice)

    def _placed(self, choice: Sequence[int]) -> bool:
        """Whether shares of GPUs can be placed, for every listed set of stages that can overlap."""
        if not self.options:
            return True
        chosen = [self.options[i][o] for i, o in enumerate(choice)]
        held = {i for i, option in enumerate(chosen) if self.capacity.devices_of(option) is not None}
        sets = {tuple(i for i in members if i in held) for members in self.sets} if held else set()
        return all(self.capacity.places(*(chosen[i] for i in some)) for some in sets if some)

    def _least(self, at: int) -> NDArray[np.float64]:
        least: NDArray[np.float64] = self.needs[at].min(axis=0)
        return least


def max_weight_antichain(weights: Sequence[float], order: frozenset[tuple[int, int]]) -> tuple[int, ...]:
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


def _placeable(capacity: Capacity, option: Option) -> bool:
    """Whether an option's workers can be placed on empty devices: exact, as they are alike."""
    devices, share = capacity.devices_of(option), option.size.share
    return devices is None or share is None or most_at_once(share, devices) >= option.workers


def _as_placeable(capacity: Capacity, a: Option, b: Option) -> bool:
    """Whether *a* can be placed on devices wherever *b* can: no more workers, none with a larger share."""
    mine, theirs = a.size.share, b.size.share
    if mine is None or (devices := capacity.devices_of(a)) is None:
        return True
    if theirs is None or capacity.devices_of(b) != devices:
        return False
    return a.workers <= b.workers and all(
        mine.gpu <= theirs.gpu and mine.memory_on(device) <= theirs.memory_on(device) for device in devices
    )


def _waits(workflow: Workflow) -> frozenset[tuple[int, int]]:
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

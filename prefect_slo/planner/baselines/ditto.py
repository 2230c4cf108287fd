r"""Ditto (Jin et al., SIGCOMM 2023): workers in proportion to the square roots of work, edges grouped to copy nothing.

With stage times :math:`a_i/d_i + b_i` and D slots, Cauchy and Schwarz give the least of :math:`Σ a_i/d_i` on a chain as
:math:`(Σ\sqrt{a_i})²/D` at :math:`d_i ∝ \sqrt{a_i}` (§4.2). A subtree acts as one stage with the weight

    series:    r = (√a + √r_c)²      of a stage after its inputs, which get √r_c/(√a + √r_c) of the slots
    parallel:  r = Σ r_j             of inputs side by side, which share in proportion to r_j

For least cost, d_i ∝ √(m_i·a_i) with m_i the memory of a worker (§4.3). Stages joined by a zero-copy edge share an
executor, and neither write nor read that edge: its work leaves their weights (§4.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from prefect_slo.objective import Objective
from prefect_slo.plan import Plan
from prefect_slo.planner.baselines.allocation import Divide, allocate
from prefect_slo.planner.problem import Problem
from prefect_slo.planner.sampling import TableSource

Floats = NDArray[np.float64]
Inputs = Sequence[tuple[int, ...]]
"""By stage in topological order, the stages that it reads from."""

GROUP = 3
"""Most stages that share an executor."""

LEAST = 1e-9


@dataclass(frozen=True)
class Transfer:
    """What an edge costs in worker-seconds: ``write_s`` in the parent, ``read_s`` in the child."""

    write_s: float
    read_s: float


@dataclass(frozen=True)
class Layout:
    """Degrees and groups.

    Attributes:
        workers: Degree of parallelism by stage, ``(n_stages,)``.
        groups: Stages that share an executor.
    """

    workers: Floats
    groups: tuple[tuple[int, ...], ...]


def ditto_latency(
    model: TableSource, objective: Objective, *, seed: int = 0, samples: int = 2000,
    transfers: Mapping[tuple[str, str], Transfer] | None = None, executor_slots: float = inf,
) -> Plan:  # fmt: skip
    """Ditto-L: degrees for the least completion time of the slots used.

    Args:
        model: Draws samples per menu option; give it a model of kind ``analytic`` to have Ditto's own.
        objective: A latency bound, a budget or both.
        seed: Of the samples.
        samples: How many.
        transfers: By edge (parent, child): what copying nothing saves there.
        executor_slots: Workers that fit one executor: a group that doesn't loses its last edge.

    Raises:
        InfeasibleSlo: Nothing fits the workflow's constraints and capacity.
    """
    return _ditto(model, objective, seed, samples, transfers or {}, executor_slots, cost=False)


def ditto_cost(
    model: TableSource, objective: Objective, *, seed: int = 0, samples: int = 2000,
    transfers: Mapping[tuple[str, str], Transfer] | None = None, executor_slots: float = inf,
) -> Plan:  # fmt: skip
    """Ditto-C: degrees for the least cost of the slots used. Arguments as in ``ditto_latency``."""
    return _ditto(model, objective, seed, samples, transfers or {}, executor_slots, cost=True)


def degrees_for_time(work: Floats, inputs: Inputs, slots: float) -> Floats:
    """Workers by stage for the least completion time, ``(n_stages,)``, not rounded.

    A stage that several others read counts as input of the last of them, so that the graph is a forest.
    """
    feeds = _forest(inputs)
    weight = np.maximum(np.asarray(work, dtype=float), LEAST)
    below = np.zeros(len(weight))
    total = weight.copy()
    for i, children in enumerate(feeds):
        below[i] = sum(total[c] for c in children)
        total[i] = (np.sqrt(weight[i]) + np.sqrt(below[i])) ** 2
    fed = {c for children in feeds for c in children}
    roots = [i for i in range(len(weight)) if i not in fed]
    given = np.zeros(len(weight))
    given[roots] = slots * total[roots] / total[roots].sum()
    degrees = np.zeros(len(weight))
    for i in reversed(range(len(weight))):
        degrees[i] = given[i] * np.sqrt(weight[i]) / (np.sqrt(weight[i]) + np.sqrt(below[i]))
        for c in feeds[i]:
            given[c] = (given[i] - degrees[i]) * total[c] / below[i]
    return degrees


def degrees_for_cost(work: Floats, memory: Floats, slots: float) -> Floats:
    """Workers by stage for the least cost, in proportion to √(memory · work), ``(n_stages,)``."""
    roots = np.sqrt(np.maximum(np.asarray(work, dtype=float) * memory, LEAST))
    return np.asarray(slots * roots / roots.sum())


def lay_out(
    work: Floats, inputs: Inputs, transfers: Mapping[tuple[int, int], Transfer], slots: float, *,
    cost: bool = False, executor_slots: float = inf,
) -> Layout:  # fmt: skip
    """Group edges, divide the slots, and cut the last edge of a group that an executor can't hold, until all fit."""
    kept = list(transfers)
    memory = np.ones(len(work))
    while True:
        groups = _groups(kept, transfers, len(work))
        inside = [e for e in kept if any(e[0] in group and e[1] in group for group in groups)]
        weight = np.asarray(work, dtype=float).copy()
        for parent, child in inside:
            weight[parent] -= transfers[parent, child].write_s
            weight[child] -= transfers[parent, child].read_s
        weight = np.maximum(weight, LEAST)
        workers = degrees_for_cost(weight, memory, slots) if cost else degrees_for_time(weight, inputs, slots)
        heavy = [group for group in groups if workers[list(group)].sum() > executor_slots and len(group) > 1]
        if not heavy:
            return Layout(workers, tuple(group for group in groups if len(group) > 1))
        kept.remove(max(edge for edge in inside if edge[0] in heavy[0] and edge[1] in heavy[0]))


def _groups(
    edges: Sequence[tuple[int, int]], transfers: Mapping[tuple[int, int], Transfer], n: int
) -> list[tuple[int, ...]]:
    """Stages joined by edges, the dearest first, as long as a group stays a path of at most three stages."""
    group: dict[int, tuple[int, ...]] = {i: (i,) for i in range(n)}
    for parent, child in sorted(edges, key=lambda e: -(transfers[e].write_s + transfers[e].read_s)):
        left, right = group[parent], group[child]
        if left is not right and left[-1] == parent and right[0] == child and len(left) + len(right) <= GROUP:
            joined = left + right
            for i in joined:
                group[i] = joined
    return list(dict.fromkeys(group.values()))


def _forest(inputs: Inputs) -> list[list[int]]:
    """By stage, the inputs that no later stage reads."""
    reader = {p: i for i, parents in enumerate(inputs) for p in parents}
    feeds: list[list[int]] = [[] for _ in inputs]
    for p, i in reader.items():
        feeds[i].append(p)
    return feeds


def _ditto(
    model: TableSource, objective: Objective, seed: int, samples: int,
    transfers: Mapping[tuple[str, str], Transfer], executor_slots: float, *, cost: bool,
) -> Plan:  # fmt: skip
    def divide(problem: Problem) -> Divide:
        position = {stage.name: i for i, stage in enumerate(problem.stages)}
        inputs = [tuple(p for p, _ in stage.parents) for stage in problem.stages]
        edges = {(position[a], position[b]): transfer for (a, b), transfer in transfers.items()}
        return lambda work, slots: lay_out(work, inputs, edges, slots, cost=cost, executor_slots=executor_slots).workers

    return allocate(model, objective, divide, seed=seed, samples=samples)

r"""A lower bound for graphs with parallel branches: one chance constraint per path, costs shared out between them.

In one scenario a single branch is slow, so the scenarios' bounds see one branch at its percentile and the others at
their typical speed; but a plan must have *every* path at its percentile. With paths *p* and shares
:math:`w_{ip} ≥ 0`, :math:`Σ_p w_{ip} = 1` of each stage's cost (Lagrangian decomposition; Guignard and Kim, Math.
Programming 39, 1987),

    cost of any plan ≥ Σ_p min { Σ_{i ∈ p} w_ip · C_i  :  Q(length of p) ≤ bound }

Paths and shares come from splitting the multipliers' flow into paths; each path is a chain, on which the search is
nearly exact.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.capacity import Antichains
from prefect_slo.planner.multipliers import Network
from prefect_slo.planner.problem import Choice, CompiledStage, Goal, Problem
from prefect_slo.planner.relax import ScenarioBounds
from prefect_slo.planner.search import search
from prefect_slo.workflow import Edge

Floats = NDArray[np.floating]

PATHS = 8
"""Most paths; what flow is left on others is small by then."""

STAGES = 160
"""Most stages over all paths: a large graph spreads its flow over so many paths that few of them say little."""

LEAST_FLOW = 0.01
"""Paths with less of the flow than this are left out."""

NODES = 40
"""Nodes per path."""


def path_bound(
    problem: Problem, goal: Goal, plan: Choice, bounds: ScenarioBounds | None = None, node_limit: int = NODES
) -> float:
    """No plan keeps the latency bound for less; minus infinity where the bound does not apply.

    It applies to least mean cost under a latency bound (a cost bound besides only makes plans dearer) on graphs
    without item edges.

    Args:
        problem: Stages and samples.
        goal: Objective and bounds.
        plan: A plan that keeps the bounds; decides how tight the bound is, never whether it holds.
        bounds: The scenarios' bounds, where they are known already.
        node_limit: Nodes per path.
    """
    items = any(kind == "item" for stage in problem.stages for _, kind in stage.parents)
    if items or goal.latency_weight or not goal.cost_weight or goal.latency_bound_s == inf:
        return -inf
    plain = Goal(goal.percentile, goal.latency_bound_s)
    bounds = bounds or ScenarioBounds.of(problem, plain, plan)
    value = bounds.root()
    near = np.argsort(value, kind="stable")[-bounds.excused - 32 :]
    paths = split(bounds.multipliers.network, bounds.multipliers.flow[:, near].mean(axis=1))
    through = np.zeros(len(problem.stages))
    for flow, path in paths:
        through[path] += flow
    total = sum(_least(problem, i) for i in range(len(problem.stages)) if not through[i])
    for flow, path in paths:
        chain = restrict(problem, path, [flow / through[i] for i in path])
        own = tuple(plan[i] for i in path)
        total += search(chain, plain, incumbent=own, node_limit=node_limit).lower_bound
    return goal.cost_weight * total


def split(network: Network, flow: Floats) -> list[tuple[float, list[int]]]:
    """Paths that make up a flow on a graph without item edges, the widest first.

    Args:
        network: The expanded graph.
        flow: ``(n_arcs,)``.

    Returns:
        Pairs of a path's flow and its stages.
    """
    flow = np.asarray(flow, dtype=float).copy()
    sinks = [a for a, arc in enumerate(network.arcs) if arc.kind == "sink"]
    size = flow[sinks].sum()
    found: list[tuple[float, list[int]]] = []
    while len(found) < min(PATHS, max(1, STAGES // network.n_stages)):
        width, by = np.zeros(network.n_stages), np.zeros(network.n_stages, dtype=int)
        for i in range(network.n_stages):
            for a in network.into[i]["start"]:
                arc = network.arcs[a]
                here = flow[a] if arc.kind == "source" else min(width[arc.tail], flow[a])
                if here > width[i]:
                    width[i], by[i] = here, a
        last = max(sinks, key=lambda a: min(width[network.arcs[a].tail], flow[a]))
        amount = float(min(width[network.arcs[last].tail], flow[last]))
        if amount <= LEAST_FLOW * size:
            break
        path, a = [], last
        while network.arcs[a].kind != "source":
            flow[a] -= amount
            path.append(network.arcs[a].tail)
            a = int(by[path[-1]])
        flow[a] -= amount
        found.append((amount, path[::-1]))
    return found


def restrict(problem: Problem, path: list[int], shares: list[float]) -> Problem:
    """The chain of some stages, each with a share of its cost.

    A stage that also depends on workers off the path takes the least over them, in every sample and on average.
    """
    stages: list[CompiledStage] = []
    for at, i in enumerate(path):
        stage = problem.stages[i]
        single = at > 0 and [p for p, _ in stage.parents] == [path[at - 1]]
        free = bool(stage.upstream) and not single
        mean = stage.mean_cost.min(axis=0, keepdims=True) if free else stage.mean_cost
        latency = stage.latency.min(axis=0, keepdims=True) if free else stage.latency
        stages.append(
            replace(
                stage,
                after=(Edge(problem.stages[path[at - 1]].name),) if at else (),
                parents=((at - 1, "all"),) if at else (),
                latency=latency,
                cost=latency,
                mean_cost=mean * shares[at],
                upstream={} if free else stage.upstream,
            )
        )
    position = {i: at for at, i in enumerate(path)}
    rules = {(position[a], position[b]): m for (a, b), m in problem.rules.items() if a in position and b in position}
    none = Antichains([], frozenset(), tuple(np.empty((len(s.options), 0)) for s in stages), np.empty(0))
    allowed = tuple(problem.allowed[i] for i in path)
    return replace(problem, stages=tuple(stages), rules=rules, allowed=allowed, antichains=none, _small=None)


def _least(problem: Problem, i: int) -> float:
    return float(problem.stages[i].mean_cost[:, problem.allowed[i]].min())

"""From a continuous point to the menu: round up, then probe the neighbours (Jolteon, NSDI 2024, §4.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.problem import Choice, Goal, Problem, percentile

Floats = NDArray[np.float64]

DEPTH = 4
"""Steps that probing goes away from the rounded point."""

WIDTH = 16
"""Points whose neighbours are probed next; all of them would be 10⁵ at 8 stages."""


def round_up(problem: Problem, grids: Sequence[NDArray[np.intp]], workers: Floats, vcpus: Floats) -> Choice:
    """The option with the fewest workers, then vCPUs, not below the point; the largest where none is.

    Args:
        problem: Stages.
        grids: Positions of the options that may be taken, by stage.
        workers: ``(n_stages,)``.
        vcpus: ``(n_stages,)``.
    """
    choice = []
    for stage, grid, d, v in zip(problem.stages, grids, workers, vcpus, strict=True):
        sizes = {int(o): (int(stage.workers[o]), stage.options[o].size.vcpus) for o in grid}
        above = [o for o, (a, b) in sizes.items() if a >= d * (1 - 1e-6) and b >= v * (1 - 1e-6)]
        choice.append(min(above, key=sizes.__getitem__) if above else max(sizes, key=sizes.__getitem__))
    return tuple(choice)


def probe(problem: Problem, goal: Goal, grids: Sequence[NDArray[np.intp]], start: Choice, depth: int = DEPTH) -> Choice:
    """The best plan within ``depth`` steps of the grid: least score among those that keep the goal in the samples.

    Where none keeps it, the plan nearest to the bound. A neighbour is one step of one stage in workers or in vCPUs.
    """
    seen = {start: _rank(problem, goal, start)}
    frontier = [start]
    for _ in range(depth):
        fresh = [c for choice in frontier for c in _neighbours(problem, grids, choice) if c not in seen]
        seen |= {choice: _rank(problem, goal, choice) for choice in fresh if problem.admits(choice)}
        frontier = sorted((c for c in dict.fromkeys(fresh) if c in seen), key=seen.__getitem__)[:WIDTH]
    return min((choice for choice in seen if problem.admits(choice)), key=seen.__getitem__, default=start)


def _rank(problem: Problem, goal: Goal, choice: Choice) -> tuple[float, float]:
    """How far a plan's percentile lies over the bound, relatively, and its score."""
    allowed = goal.allowed(problem.n_samples)
    slow, cost = percentile(problem.latency(choice), allowed), problem.mean_cost(choice)
    over = max(slow / goal.latency_bound_s, percentile(problem.cost(choice), allowed) / goal.cost_bound_usd)
    return max(over - 1.0, 0.0), goal.cost_weight * cost + goal.latency_weight * slow


def _neighbours(problem: Problem, grids: Sequence[NDArray[np.intp]], choice: Choice) -> Iterator[Choice]:
    for i, (stage, grid) in enumerate(zip(problem.stages, grids, strict=True)):
        d, v = int(stage.workers[choice[i]]), stage.options[choice[i]].size.vcpus
        same_v = sorted((int(stage.workers[o]), int(o)) for o in grid if stage.options[o].size.vcpus == v)
        same_d = sorted((stage.options[o].size.vcpus, int(o)) for o in grid if stage.workers[o] == d)
        for line in (same_v, same_d):
            at = [o for _, o in line].index(choice[i])
            for other in (at - 1, at + 1):
                if 0 <= other < len(line):
                    yield (*choice[:i], line[other][1], *choice[i + 1 :])

"""Dividing a number of slots over the stages: what Ditto and Caerus have in common.

Both fix the size of a slot and split D of them by a rule. Here every size of the menu and some numbers of slots are
tried, and the best plan that keeps the objective in the samples is taken, or else the fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.objective import Objective, Slo
from prefect_slo.plan import Plan
from prefect_slo.planner.baselines.grid import comparable, nearest_size, nearest_workers, sizes_at
from prefect_slo.planner.goals import goal_of
from prefect_slo.planner.make import uncertified
from prefect_slo.planner.problem import Choice, CompiledStage, Problem, percentile
from prefect_slo.planner.sampling import Sampler, TableSource

Floats = NDArray[np.float64]

Divide = Callable[[Floats, float], Floats]
"""Workers of each stage from the stages' work (worker-seconds, ``(n_stages,)``) and the number of slots."""

SLOT_COUNTS = 24
"""Numbers of slots tried, from one per stage to the most that the menus hold, geometrically."""


def allocate(
    model: TableSource,
    objective: Objective,
    divide: Callable[[Problem], Divide],
    *,
    seed: int,
    samples: int,
    slots: Sequence[int] | None = None,
) -> Plan:
    """The best plan over sizes and numbers of slots.

    Args:
        model: Draws samples per menu option.
        objective: A latency bound, a budget or both.
        divide: Makes the rule, given the problem.
        seed: Of the samples.
        samples: How many.
        slots: Numbers of slots; a range over the menu by default.

    Raises:
        InfeasibleSlo: Nothing fits the workflow's constraints and capacity.
    """
    sampler, goal = Sampler(model, seed, samples=samples), goal_of(objective)
    problem = sampler.problem()
    rule = divide(problem)
    grids = [comparable(stage, mask) for stage, mask in zip(problem.stages, problem.allowed, strict=True)]
    sizes = sorted({s.options[o].size.vcpus for s, grid in zip(problem.stages, grids, strict=True) for o in grid})
    most = sum(int(stage.workers[grid].max()) for stage, grid in zip(problem.stages, grids, strict=True))
    totals = slots or np.unique(np.geomspace(len(grids), most * len(grids), SLOT_COUNTS).round())
    found: dict[Choice, None] = {}
    for vcpus in sizes:
        work = np.array(
            [line_of(stage, mask, vcpus)[0] for stage, mask in zip(problem.stages, problem.allowed, strict=True)]
        )
        for total in totals:
            choice = _rounded(problem, rule(work, float(total)), vcpus)
            if problem.admits(choice):
                found[choice] = None
    if not found:
        raise InfeasibleSlo("a plan", None, problem.stages[0].name, 0.0)
    allowed = goal.allowed(problem.n_samples)
    scores = {choice: problem.score(choice, goal) for choice in found}
    if min(scores.values()) == inf:
        scores = {choice: percentile(problem.latency(choice), allowed) for choice in found}
    return uncertified(sampler, problem, min(scores.items(), key=lambda pair: pair[1])[0], Slo.of(objective))


def line_of(stage: CompiledStage, allowed: NDArray[np.bool_], vcpus: float) -> tuple[float, float]:
    """a and b ≥ 0 of mean time = a/d + b at the sizes nearest to a number of vCPUs."""
    counts = np.unique(stage.workers[comparable(stage, allowed)])
    options = [nearest_size(stage, sizes_at(stage, allowed, int(d)), vcpus) for d in counts]
    times = stage.latency[:, options].mean(axis=(0, 2), dtype=np.float64)
    design = np.stack([1.0 / counts, np.ones(len(counts))], axis=1)
    a, b = nnls(design / times[:, None], np.ones(len(counts)))[0]
    return float(a), float(b)


def _rounded(problem: Problem, workers: Floats, vcpus: float) -> Choice:
    choice = []
    for stage, mask, count in zip(problem.stages, problem.allowed, workers, strict=True):
        choice.append(nearest_size(stage, sizes_at(stage, mask, nearest_workers(stage, mask, count)), vcpus))
    return tuple(choice)

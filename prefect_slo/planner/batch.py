"""Many plans at once: mean cost and latency percentile of a stack of choices, on some of the samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefect_slo.models.makespan import Progress, advance
from prefect_slo.planner.problem import Problem

Choices = NDArray[np.intp]
"""Stack of choices, ``(n_plans, n_stages)``."""


def rows_of(problem: Problem, choices: Choices) -> Choices:
    """Row of each stage's table for each plan, ``(n_plans, n_stages)``."""
    rows = np.zeros_like(choices)
    for i, stage in enumerate(problem.stages):
        if stage.upstream:
            total = np.sum([problem.stages[p].workers[choices[:, p]] for p, _ in stage.parents], axis=0)
            keys = np.fromiter(stage.upstream, dtype=np.int64)
            values = np.fromiter(stage.upstream.values(), dtype=np.intp)
            order = np.argsort(keys)
            rows[:, i] = values[order][np.searchsorted(keys[order], total)]
    return rows


def mean_costs(problem: Problem, choices: Choices, rows: Choices) -> NDArray[np.float64]:
    """Mean cost of each plan in US dollars, ``(n_plans,)``."""
    total = np.zeros(len(choices))
    for i, stage in enumerate(problem.stages):
        total += stage.mean_cost[rows[:, i], choices[:, i]]
    return total


def latencies(problem: Problem, choices: Choices, rows: Choices) -> NDArray[np.floating]:
    """Latency of each plan in each sample, driver included, ``(n_plans, n_samples)``."""
    progress: dict[str, Progress] = {}
    end: NDArray[np.floating] | float = 0.0
    for i, stage in enumerate(problem.stages):
        own = stage.latency[rows[:, i], choices[:, i]]
        progress[stage.name] = advance(stage.after, own, progress, stage.waves_at((choices[:, i], None)))
        end = np.maximum(end, progress[stage.name].finish)
    return np.asarray(end + problem.driver)


def costs(problem: Problem, choices: Choices, rows: Choices) -> NDArray[np.floating]:
    """Cost of each plan in each sample, ``(n_plans, n_samples)``."""
    total = np.zeros((len(choices), problem.n_samples), dtype=np.float32)
    for i, stage in enumerate(problem.stages):
        total += stage.cost[rows[:, i], choices[:, i]]
    return total


def admitted(problem: Problem, choices: Choices) -> NDArray[np.bool_]:
    """Which plans keep pins, constraints and (where the workflow has a capacity) capacity, ``(n_plans,)``."""
    keep = np.ones(len(choices), dtype=bool)
    for i, mask in enumerate(problem.allowed):
        keep &= mask[choices[:, i]]
    for (a, b), matrix in problem.rules.items():
        keep &= matrix[choices[:, a], choices[:, b]]
    if problem.antichains.limits.size:
        keep[keep] = [problem.antichains.admit(choice.tolist()) for choice in choices[keep]]
    return keep

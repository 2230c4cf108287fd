"""Least time that open stages can take, sample by sample: every stage at its fastest option."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.problem import Problem

Floats = NDArray[np.floating]


def fastest(problem: Problem, i: int) -> tuple[Floats, Floats]:
    """Per scenario, a stage's least time and least wave over its options, ``(n_columns,)`` each."""
    stage, mask = problem.stages[i], problem.allowed[i]
    own = stage.latency[:, mask]
    least = own.min(axis=(0, 1))
    if (stage.piece[mask] == 1).all():
        return least, least
    return least, (own * stage.piece[mask, None]).min(axis=(0, 1))


def tails(problem: Problem) -> tuple[list[Floats], list[Floats]]:
    """Least time from each stage's end, and from its hand-over, to the end of the run, ``(n_columns,)`` each."""
    n = len(problem.stages)
    zero = np.zeros(problem.n_samples, dtype=np.float32)
    end, handover = [zero] * n, [zero] * n
    for j in reversed(range(n)):
        least, wave = fastest(problem, j)
        from_start = np.maximum(least + end[j], wave + handover[j])
        for p, kind in problem.stages[j].parents:
            if kind == "item":
                end[p] = np.maximum(end[p], wave + end[j])
                handover[p] = np.maximum(handover[p], from_start)
            else:
                end[p] = np.maximum(end[p], from_start)
    return end, handover

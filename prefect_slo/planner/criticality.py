"""Where the time and the money of a plan go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.network import Network
from prefect_slo.planner.problem import Problem


@dataclass(frozen=True)
class Criticality:
    """How a stage matters to a plan.

    Attributes:
        stage: Its name.
        probability: How often it lies on the longest path.
        path_share: Mean share of the longest path that it takes.
        cost_share: Share of mean cost.
    """

    stage: str
    probability: float
    path_share: float
    cost_share: float


def criticality(problem: Problem, choice: Sequence[int]) -> tuple[Criticality, ...]:
    """Where the time and the money of a choice go, by stage in topological order."""
    on, times, spent = on_path(problem, choice)
    total = np.maximum(sum(np.where(mask, time, 0.0) for mask, time in zip(on, times, strict=True)), 1e-12)
    money = max(sum(spent), 1e-300)
    return tuple(
        Criticality(stage.name, float(mask.mean()), float(np.where(mask, time / total, 0.0).mean()), cost / money)
        for stage, mask, time, cost in zip(problem.stages, on, times, spent, strict=True)
    )


def on_path(
    problem: Problem, choice: Sequence[int]
) -> tuple[list[NDArray[np.bool_]], list[NDArray[np.floating]], list[float]]:
    """By stage: whether it lies on the longest path and the time it takes there, ``(n_samples,)``; mean cost."""
    network = Network.of(problem.stages)
    latency, piece, spent = [], [], []
    for i, stage in enumerate(problem.stages):
        row = problem.upstream_row(i, choice)
        latency.append(stage.latency[row, choice[i]])
        piece.append(latency[-1] * stage.piece[choice[i]])
        spent.append(float(stage.mean_cost[row, choice[i]]))
    _, arcs = network.longest(latency, piece)
    masks, times = [], []
    for i, into in enumerate(network.into):
        whole = arcs[into["full"][0]]
        part = arcs[[*into["piece"], *into["tail"]]].any(axis=0)
        masks.append((whole | part) & (latency[i] > 0))
        times.append(np.where(whole, latency[i], piece[i]))
    return masks, times, spent

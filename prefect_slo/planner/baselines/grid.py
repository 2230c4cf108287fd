"""What published planners may choose from: worker counts × sizes of one kind."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.problem import CompiledStage

Mask = NDArray[np.bool_]


def comparable(stage: CompiledStage, allowed: Mask) -> NDArray[np.intp]:
    """Positions of the allowed options that share the most common pool, hardware, batch and knobs."""
    kinds = {int(o): _kind(stage, int(o)) for o in np.flatnonzero(allowed)}
    values = list(kinds.values())
    common = max(dict.fromkeys(values), key=values.count)
    return np.array([o for o, kind in kinds.items() if kind == common], dtype=np.intp)


def nearest_workers(stage: CompiledStage, allowed: Mask, workers: float) -> int:
    """The most workers on a stage's menu that are not above a number, or else the fewest."""
    counts = np.unique(stage.workers[comparable(stage, allowed)])
    below = counts[counts <= workers * (1 + 1e-9)]
    return int(below[-1] if below.size else counts[0])


def sizes_at(stage: CompiledStage, allowed: Mask, workers: int) -> list[int]:
    """Options of a stage with so many workers, from the smallest size to the largest."""
    mine = [int(o) for o in comparable(stage, allowed) if stage.workers[o] == workers]
    return sorted(mine, key=lambda o: (stage.options[o].size.vcpus, stage.options[o].size.memory_mb))


def nearest_size(stage: CompiledStage, options: list[int], vcpus: float) -> int:
    """The option whose size is nearest in vCPU."""
    return min(options, key=lambda o: abs(stage.options[o].size.vcpus - vcpus))


def _kind(stage: CompiledStage, o: int) -> tuple[object, ...]:
    option = stage.options[o]
    return option.pool, option.size.kind, option.batch, option.knobs

"""The same runs at whatever setting they are asked of: a draw of parameters and noise that plans share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from prefect_slo.models.design import Ints, Points
from prefect_slo.models.protocol import Draws, StageModel

SEEDS = 2**62
"""Seeds lie below this."""


class StageLuck(Protocol):
    """Parameters and noise of some runs of one stage."""

    def at(self, points: Points, runs: Ints | None = None) -> Draws:
        """What the runs, or those with these numbers, take at each point, shapes ``(n_points, n_samples)``."""
        ...


@runtime_checkable
class _Lucky(Protocol):
    def luck(self, n_samples: int, rng: np.random.Generator, *, blocks: int | None = None) -> StageLuck:
        """Arguments as those of ``StageModel.sample``."""
        ...


@dataclass(frozen=True)
class Again:
    """Luck of a model that has none of its own: it draws from the same seed each time."""

    model: StageModel
    n_samples: int
    seed: int
    blocks: int | None = None

    def at(self, points: Points, runs: Ints | None = None) -> Draws:
        """As ``StageLuck.at``."""
        drawn = self.model.sample(points, self.n_samples, np.random.default_rng(self.seed), blocks=self.blocks)
        return drawn if runs is None else Draws(drawn.wall_s[:, runs], drawn.busy_s[:, runs])


def luck_of(model: StageModel, n_samples: int, rng: np.random.Generator, blocks: int | None = None) -> StageLuck:
    """The luck of some runs; arguments as those of ``StageModel.sample``."""
    if isinstance(model, _Lucky):
        return model.luck(n_samples, rng, blocks=blocks)
    return Again(model, n_samples, int(rng.integers(SEEDS)), blocks)

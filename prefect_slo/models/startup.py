"""What a cold start adds to a stage: seconds of wall and of busy time, beyond a warm run at the same setting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefect_slo.models.design import Floats


@dataclass(frozen=True)
class Startup:
    """Extra seconds seen in cold rows; empty where none was seen.

    Attributes:
        wall_s: Extra wall time, shape ``(n_rows,)``.
        busy_s: Extra busy time of the same rows.
    """

    wall_s: Floats
    busy_s: Floats

    @classmethod
    def of(cls, cold_wall_s: Floats, cold_busy_s: Floats, warm_wall_s: Floats, warm_busy_s: Floats) -> Startup:
        """From cold rows and what a warm run is expected to take at their settings; never below 0."""
        wall = np.maximum(cold_wall_s - warm_wall_s, 0.0)
        return cls(wall, np.clip(cold_busy_s - warm_busy_s, 0.0, wall))

    def sample(self, n_samples: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Joint draws of extra wall and busy time, shapes ``(n_samples,)``."""
        if not len(self.wall_s):
            return np.zeros(n_samples), np.zeros(n_samples)
        rows = rng.integers(len(self.wall_s), size=n_samples)
        return self.wall_s[rows], self.busy_s[rows]

"""The stage model of Caerus (NSDI'21) and Ditto (SIGCOMM'23, §3): time = a·load/v + b, one line per step.

A baseline. Steps are fitted by least squares on the parallelism x = d·v that they are later asked at, with a, b ≥ 0;
the originals are deterministic, so residuals stand in for noise to give it honest quantiles.
"""

from __future__ import annotations

from typing import Self

import numpy as np

from prefect_slo.errors import NotEnoughObservations
from prefect_slo.models.design import Floats, Points, StageData
from prefect_slo.models.noise import Noise
from prefect_slo.models.posynomial import nonnegative
from prefect_slo.models.protocol import Draws, Response

_SEED = 20240416
_SAMPLES = 4000


class Analytic:
    """a·load/v + b per step, with the residuals as noise."""

    @property
    def depends_on_upstream(self) -> bool:
        """Never: the model has no such term."""
        return False

    def fit(self, data: StageData) -> Self:
        """Learn from rows.

        Raises:
            NotEnoughObservations: No row at all.
        """
        if not len(data):
            raise NotEnoughObservations("stage", 0, 1, "Run the flow once in mode 'observe'.")
        steps = list(data.steps_s.T) if data.steps_s.shape[1] else [data.busy_s]
        design = self._design(data.points)
        self.busy = sum((nonnegative(design, step, data.weights) for step in steps), np.zeros(2))
        self.wall = self.busy + nonnegative(design, np.maximum(data.wall_s - data.busy_s, 0.0), data.weights)
        self._floor_s = 1e-3 * float(np.min(data.busy_s))
        self.noise = Noise(
            np.log(data.wall_s / self._located(data.points, "wall")),
            np.log(data.busy_s / self._located(data.points, "busy")),
            data.weights,
            max(len(data) - 2.0, 1.0) + 1.0,
        )
        return self

    def mean(self, points: Points, response: Response = "wall") -> Floats:
        """Expected seconds at each point, shape ``(n_points,)``."""
        return self._located(points, response) * float(np.mean(self._factors(response)))

    def quantile(self, points: Points, q: float, response: Response = "wall") -> Floats:
        """The ``q``-quantile in seconds at each point, shape ``(n_points,)``."""
        return self._located(points, response) * float(np.quantile(self._factors(response), q))

    def sample(self, points: Points, n_samples: int, rng: np.random.Generator, *, blocks: int | None = None) -> Draws:
        """Joint draws at each point, shapes ``(n_points, n_samples)``."""
        wall_noise, busy_noise = self.noise.sample(n_samples, rng, blocks=blocks)
        wall = np.outer(self._located(points, "wall"), np.exp(wall_noise))
        return Draws(wall, np.minimum(np.outer(self._located(points, "busy"), np.exp(busy_noise)), wall))

    def _factors(self, response: Response) -> Floats:
        wall, busy = self.noise.sample(_SAMPLES, np.random.default_rng(_SEED))
        factors: Floats = np.exp(wall if response == "wall" else busy)
        return factors

    def _located(self, points: Points, response: Response) -> Floats:
        seconds = self._design(points) @ (self.wall if response == "wall" else self.busy)
        return np.maximum(seconds, self._floor_s)

    @staticmethod
    def _design(points: Points) -> Floats:
        return np.stack([points.load / points.vcpus, np.ones(len(points))], axis=1)

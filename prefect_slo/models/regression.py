"""The stage model of Jolteon (NSDI'24, §4): ordinary least squares per step, its covariance taken for the noise.

    read, write:  x/d + c        compute:  y/(k·d) + l·ln(X)/X + q/X² + c,   X = k·d or d, whichever fits better

with *k* vCPUs of each of *d* workers; a table without steps has all of these terms for busy time as a whole. A stage
that always has one worker takes 1/k for 1/(k·d), and reads and writes in proportion to its parents' workers. What wall
time exceeds busy time by is resampled from all rows, whatever their setting.

A baseline. Coefficients may be negative, so that times can turn negative or rise with more cores. Its spread is that of
the estimated coefficients and not of runs: it shrinks as rows are added, though no run got steadier (white-box models
keep the two apart).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from prefect_slo.errors import NotEnoughObservations
from prefect_slo.models.design import Floats, Points, StageData
from prefect_slo.models.protocol import Draws, Response

_SEED = 20240416
_SAMPLES = 4000
_LEAST_SHARE = 1e-3
"""Least time believed, as a share of the shortest measured one; the original allows any, below 0 too."""


@dataclass(frozen=True)
class _Step:
    """Estimated coefficients of one step and a root of their covariance, ``(n_terms,)`` and ``(n_terms, n_terms)``."""

    terms: str
    theta: Floats
    root: Floats


class Regression:
    """Steps by ordinary least squares, with normal draws of their coefficients."""

    @property
    def depends_on_upstream(self) -> bool:
        """Whether the stage always has one worker."""
        return self._lone

    def fit(self, data: StageData) -> Self:
        """Learn from rows.

        Raises:
            NotEnoughObservations: No row at all.
        """
        if not len(data):
            raise NotEnoughObservations("stage", 0, 1, "Run the flow once in mode 'observe'.")
        self._lone = bool((data.points.workers == 1).all())
        self._floor_s = _LEAST_SHARE * float(np.min(data.busy_s))
        self._waiting = np.maximum(data.wall_s - data.busy_s, 0.0)
        if data.steps_s.shape[1]:
            read, compute, write = data.steps_s.T
            self._steps = [self._moved(data, read), self._computed(data, compute), self._moved(data, write)]
        else:
            self._steps = [self._computed(data, data.busy_s, whole=True)]
        return self

    def mean(self, points: Points, response: Response = "wall") -> Floats:
        """Expected seconds at each point, shape ``(n_points,)``."""
        expected: Floats = self._drawn(points, response).mean(axis=1)
        return expected

    def quantile(self, points: Points, q: float, response: Response = "wall") -> Floats:
        """The ``q``-quantile in seconds at each point, shape ``(n_points,)``."""
        return np.asarray(np.quantile(self._drawn(points, response), q, axis=1), dtype=float)

    def sample(self, points: Points, n_samples: int, rng: np.random.Generator, *, blocks: int | None = None) -> Draws:
        """Joint draws at each point, shapes ``(n_points, n_samples)``; ``blocks`` share their coefficients."""
        n_draws = n_samples if blocks is None else blocks
        busy = np.zeros((len(points), n_draws))
        for step in self._steps:
            drawn = step.theta[:, None] + step.root @ rng.standard_normal((len(step.theta), n_draws))
            busy += self._design(points, step.terms) @ drawn
        busy = np.repeat(np.maximum(busy, self._floor_s), n_samples // n_draws, axis=1)
        return Draws(busy + rng.choice(self._waiting, n_samples), busy)

    def _drawn(self, points: Points, response: Response) -> Floats:
        draws = self.sample(points, _SAMPLES, np.random.default_rng(_SEED))
        return np.asarray(draws.wall_s if response == "wall" else draws.busy_s, dtype=float)

    def _moved(self, data: StageData, seconds: Floats) -> _Step:
        return self._fitted(data, seconds, "moved")[1]

    def _computed(self, data: StageData, seconds: Floats, *, whole: bool = False) -> _Step:
        tried = [self._fitted(data, seconds, f"{x} whole" if whole else x) for x in ("k·d", "d")]
        return min(tried, key=lambda found: found[0])[1]

    def _fitted(self, data: StageData, seconds: Floats, terms: str) -> tuple[float, _Step]:
        """Mean absolute relative error, and the step."""
        design = self._design(data.points, terms)
        inverse = np.linalg.pinv(design.T @ (data.weights[:, None] * design))
        theta: Floats = inverse @ (design.T @ (data.weights * seconds))
        left = seconds - design @ theta
        freedom = max(len(seconds) - int(np.linalg.matrix_rank(design)), 1)
        values, vectors = np.linalg.eigh(inverse * float(np.sum(data.weights * left**2)) / freedom)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        return float(np.mean(np.abs(left) / np.maximum(seconds, 1e-9))), _Step(terms, theta, root)

    def _design(self, points: Points, terms: str) -> Floats:
        d, k, one = 1.0 / points.load, points.vcpus, np.ones(len(points))
        if terms == "moved":
            return np.stack([points.upstream if self._lone else 1.0 / d, one], axis=1)
        x = d if terms.startswith("d") and not self._lone else d * k
        columns = [1.0 / (d * k), np.log(x) / x, 1.0 / x**2, one]
        if terms.endswith("whole"):
            columns.append(points.upstream if self._lone else 1.0 / d)
        return np.stack(columns, axis=1)

r"""The stage model of Jolteon (NSDI'24, §4.1): a formula per step, its coefficients random with the fit's covariance.

    step(d, v, u) = θ₀ + θ₁/d + θ₂/(d·v) + θ₃·ln X / X + θ₄/X² + θ₅·u        X = d·v or d, whichever fits better
    wall = Σ steps + overhead                                                θ ~ N(θ̂, covariance of θ̂)

A stage of one worker has θ₀ + θ₁/v + θ₂·ln v/v + θ₃/v² + θ₄·u. Least squares without a sign constraint; the overhead of
a run is one of those measured, at whatever setting. A baseline: the covariance of the estimate stands in for the noise
of runs, so that its spread shrinks as the profile grows.
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


@dataclass(frozen=True)
class Form:
    """Which terms a formula has.

    Attributes:
        single: The stage always runs one worker.
        cores: X is d·v rather than d.
        upstream: Whether time depends on the parents' workers.
    """

    single: bool
    cores: bool
    upstream: bool

    def terms(self, d: Floats, v: Floats, u: Floats) -> Floats:
        """Terms at points, ``(n_points, n_terms)``."""
        size = v if self.single else d * v if self.cores else d
        shares = [1 / v] if self.single else [1 / d, 1 / (d * v)]
        above = [u] if self.upstream else []
        return np.stack([np.ones_like(d), *shares, np.log(size) / size, 1 / size**2, *above], axis=1)


@dataclass(frozen=True)
class _Step:
    form: Form
    theta: Floats
    root: Floats  # of the covariance, (n_terms, n_terms)
    error: float


class Jolteon:
    """Formulas with random coefficients, one per step."""

    @property
    def depends_on_upstream(self) -> bool:
        """Whether upstream workers varied where the stage's own did not."""
        return any(step.form.upstream for step in self._steps)

    def fit(self, data: StageData) -> Self:
        """Learn from rows.

        Raises:
            NotEnoughObservations: No row at all.
        """
        if not len(data):
            raise NotEnoughObservations("stage", 0, 1, "Run the flow once in mode 'observe'.")
        steps = [step for step in data.steps_s.T if step.any()] if data.steps_s.shape[1] else [data.busy_s]
        self._steps = [min(_fits(data, step), key=lambda fit: fit.error) for step in steps]
        self._overheads = np.maximum(data.wall_s - data.busy_s, 0.0)
        self._chances = data.weights / data.weights.sum()
        self._floor_s = 1e-3 * float(np.min(data.busy_s))
        return self

    def mean(self, points: Points, response: Response = "wall") -> Floats:
        """Expected seconds at each point, shape ``(n_points,)``."""
        expected: Floats = self._drawn(points, response).mean(axis=1)
        return expected

    def quantile(self, points: Points, q: float, response: Response = "wall") -> Floats:
        """The ``q``-quantile in seconds at each point, shape ``(n_points,)``."""
        return np.asarray(np.quantile(self._drawn(points, response), q, axis=1), dtype=float)

    def sample(self, points: Points, n_samples: int, rng: np.random.Generator, *, blocks: int | None = None) -> Draws:
        """Joint draws at each point, shapes ``(n_points, n_samples)``; coefficients are shared by block."""
        busy = np.zeros((len(points), n_samples))
        for step in self._steps:
            normals = rng.standard_normal((len(step.theta), blocks or n_samples))
            theta = step.theta[:, None] + step.root @ np.repeat(normals, n_samples // normals.shape[1], axis=1)
            busy += step.form.terms(points.workers, points.vcpus, points.upstream) @ theta
        busy = np.maximum(busy, self._floor_s)
        return Draws(busy + rng.choice(self._overheads, n_samples, p=self._chances), busy)

    def _drawn(self, points: Points, response: Response) -> Floats:
        draws = self.sample(points, _SAMPLES, np.random.default_rng(_SEED))
        return np.asarray(draws.wall_s if response == "wall" else draws.busy_s)


def _fits(data: StageData, seconds: Floats) -> list[_Step]:
    points = data.points
    single = len(np.unique(points.workers)) == 1
    upstream = single and len(np.unique(points.upstream)) > 1
    return [_fitted(data, seconds, Form(single, cores, upstream)) for cores in ((True,) if single else (True, False))]


def _fitted(data: StageData, seconds: Floats, form: Form) -> _Step:
    """Weighted least squares and the covariance of its estimate, s²·(ΦᵀWΦ)⁺."""
    design = form.terms(data.points.workers, data.points.vcpus, data.points.upstream)
    root = np.sqrt(data.weights)[:, None]
    scale = np.maximum(np.linalg.norm(design, axis=0), 1e-12)
    inverse = np.linalg.pinv(design / scale * root, rcond=1e-9)
    theta = inverse @ (seconds * root[:, 0])
    residuals = seconds - design / scale @ theta
    freedom = max(len(seconds) - np.linalg.matrix_rank(design), 1)
    spread = np.sqrt(float(np.sum(data.weights * residuals**2)) / freedom)
    left, values, _ = np.linalg.svd(inverse, full_matrices=False)
    error = float(np.mean(np.abs(residuals) / np.maximum(seconds, 1e-12)))
    return _Step(form, theta / scale, spread * left * values / scale[:, None], error)

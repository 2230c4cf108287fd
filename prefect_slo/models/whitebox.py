"""The default stage model: a posynomial with non-negative coefficients, corrected where it misses, plus noise.

    log T = log(θ·φ(x)) + g(x) + ε,    θ ≥ 0 (posynomial.py),  g (correction.py),  ε (noise.py)

for wall time and for busy time. Busy time is the sum of read, compute and write, each fitted by itself where the rows
have them; wall time adds an overhead (dispatch, start-up, waiting for the slowest). Parameter uncertainty is a Bayesian
bootstrap over settings for θ (Rubin 1981) and the posterior of g; it shrinks with more settings, ε does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from prefect_slo.errors import NotEnoughObservations
from prefect_slo.models.correction import Correction, fit_correction
from prefect_slo.models.design import Bools, Floats, Points, StageData
from prefect_slo.models.noise import Noise, fit_noise, setting_means
from prefect_slo.models.posynomial import Posynomial, fit_posynomial, weighted_median
from prefect_slo.models.protocol import Draws, Response

_SEED = 20240416
_OUTLIER = 4.0
_MISFIT = 4.0
_QUANTILE_SAMPLES = 4000


@dataclass(frozen=True)
class _Fit:
    """Everything learned; see ``WhiteBox``."""

    busy: tuple[Posynomial, ...]
    overhead: Posynomial | None
    wall_correction: Correction
    busy_correction: Correction
    noise: Noise
    knob_names: tuple[str, ...]
    knob_effects: Floats
    floor_s: float


class WhiteBox:
    """Posynomial with correction and noise.

    Args:
        draws: Parameter draws kept; samples take one each.
        correct: Whether settings are corrected for what the basis misses; off for comparison.
    """

    def __init__(self, *, draws: int = 64, correct: bool = True) -> None:
        self.draws = draws
        self.correct = correct

    def fit(self, data: StageData) -> Self:
        """Learn from rows.

        Raises:
            NotEnoughObservations: No row at all.
        """
        if not len(data):
            raise NotEnoughObservations("stage", 0, 1, "Run the flow once in mode 'observe'.")
        names, effects, plain = _knob_effects(data)
        settings = plain.points.settings
        held_out = _leave_out_weights(settings)
        resamples = np.concatenate([_bootstrap(settings, self.draws), held_out])
        busy, overhead = _fit_steps(plain, resamples)
        log_wall, wall_out = _log_residuals(plain.wall_s, _total(busy, overhead, plain.points, self.draws), settings)
        log_busy, busy_out = _log_residuals(plain.busy_s, _total(busy, None, plain.points, self.draws), settings)
        noise = fit_noise(log_wall, log_busy, settings, plain.weights)
        self._fit = _Fit(
            tuple(_without_held_out(part, self.draws) for part in busy),
            _without_held_out(overhead, self.draws) if overhead else None,
            self._correction(plain, log_wall, wall_out, noise.sigma),
            self._correction(plain, log_busy, busy_out, noise.sigma_busy),
            noise, names, effects, float(np.min(data.busy_s)) * 1e-3,
        )  # fmt: skip
        return self

    def mean(self, points: Points, response: Response = "wall") -> Floats:
        """Expected seconds at each point, shape ``(n_points,)``."""
        draws = self.sample(points, _QUANTILE_SAMPLES, np.random.default_rng(_SEED))
        values = draws.wall_s if response == "wall" else draws.busy_s
        expected: Floats = values.mean(axis=1)
        return expected

    def median(self, points: Points, response: Response = "wall") -> Floats:
        """Corrected basis without noise, shape ``(n_points,)``."""
        fit = self._fit
        correction = fit.wall_correction if response == "wall" else fit.busy_correction
        seconds = sum((part.at(points) for part in self._parts(response)), np.zeros(len(points)))
        corrected: Floats = np.maximum(seconds, fit.floor_s) * np.exp(correction.mean(points))
        return corrected * self._knob_factor(points)

    def quantile(self, points: Points, q: float, response: Response = "wall") -> Floats:
        """The ``q``-quantile in seconds at each point, shape ``(n_points,)``."""
        draws = self.sample(points, _QUANTILE_SAMPLES, np.random.default_rng(_SEED))
        return np.quantile(draws.wall_s if response == "wall" else draws.busy_s, q, axis=1)

    def sample(self, points: Points, n_samples: int, rng: np.random.Generator) -> Draws:
        """Joint draws at each point, shapes ``(n_points, n_samples)``; points share parameters and noise."""
        which = rng.integers(self.draws, size=n_samples)
        wall_noise, busy_noise = self._fit.noise.sample(n_samples, rng)
        wall, busy = self.locations(points)
        wall_s = wall[:, which] * np.exp(wall_noise)
        return Draws(wall_s, np.minimum(busy[:, which] * np.exp(busy_noise), wall_s))

    def locations(self, points: Points) -> tuple[Floats, Floats]:
        """Wall and busy time without noise for every parameter draw, shapes ``(n_points, n_draws)``."""
        fit = self._fit
        normals = np.random.default_rng(_SEED).standard_normal((len(points), self.draws))
        factor = self._knob_factor(points)[:, None]

        def located(response: Response, correction: Correction) -> Floats:
            total = sum((part.draws_at(points) for part in self._parts(response)), np.zeros((len(points), self.draws)))
            shift = correction.mean(points)[:, None] + correction.factor(points) @ normals
            seconds: Floats = np.maximum(total, fit.floor_s) * np.exp(shift) * factor
            return seconds

        return located("wall", fit.wall_correction), located("busy", fit.busy_correction)

    @property
    def noise(self) -> Noise:
        """The fitted run-to-run noise."""
        return self._fit.noise

    @property
    def depends_on_upstream(self) -> bool:
        """Whether any term or correction uses the number of upstream workers."""
        parts = (*self._fit.busy, *((self._fit.overhead,) if self._fit.overhead else ()))
        return any(name.startswith("u") for part in parts for name in part.terms)

    def misfits(self) -> Bools:
        """Which measured settings the basis misses by more than four standard errors, shape ``(n_settings,)``."""
        return self._fit.wall_correction.misfit > _MISFIT

    def _parts(self, response: Response) -> tuple[Posynomial, ...]:
        overhead = (self._fit.overhead,) if self._fit.overhead is not None and response == "wall" else ()
        return (*self._fit.busy, *overhead)

    def _knob_factor(self, points: Points) -> Floats:
        effects = dict(zip(self._fit.knob_names, self._fit.knob_effects.tolist(), strict=True))
        typical = float(np.median(self._fit.knob_effects))
        return np.exp([effects.get(name, typical) for name in points.knobs.tolist()])

    def _correction(self, data: StageData, residuals: Floats, held_out: Floats, noise: float) -> Correction:
        settings, weights = data.points.settings, data.weights
        first = np.unique(settings, return_index=True)[1]
        variances = noise**2 / np.bincount(settings, weights)
        clipped = np.clip(residuals, *_fence(residuals, settings, weights, noise))
        at = data.points.take(first).coordinates
        means = setting_means(clipped, settings, weights)
        if not self.correct:
            return Correction(at, means, variances, 0.0, 1e-9, np.ones(at.shape[1]))
        return fit_correction(at, means, setting_means(held_out, settings, weights), variances, noise)


def _fit_steps(data: StageData, resamples: Floats) -> tuple[tuple[Posynomial, ...], Posynomial | None]:
    """Posynomials of the steps of busy time, and of the overhead where it is measured."""
    steps = list(data.steps_s.T) if data.steps_s.shape[1] else [data.busy_s]
    busy = tuple(
        fit_posynomial(data.points, step, data.busy_s, data.weights, resamples) for step in steps if step.any()
    )
    waiting = data.wall_s - data.busy_s
    if not np.any(waiting > 1e-9 * data.wall_s):
        return busy, None
    return busy, fit_posynomial(data.points, waiting, data.wall_s, data.weights, resamples, overhead=True)


def _total(busy: tuple[Posynomial, ...], overhead: Posynomial | None, points: Points, draws: int) -> Floats:
    """Point estimate (first column) and estimates without each setting, ``(n_rows, 1 + n_settings)``."""
    parts = (*busy, overhead) if overhead else busy
    return sum(
        (np.column_stack([part.at(points), part.draws_at(points)[:, draws:]]) for part in parts),
        np.zeros((len(points), 1)),
    )


def _log_residuals(actual: Floats, estimates: Floats, settings: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Log residuals of the fit to all rows, and of each row against the fit without its setting."""
    floor = 1e-3 * float(np.min(actual))
    logs = np.log(actual)[:, None] - np.log(np.maximum(estimates, floor))
    return logs[:, 0], logs[np.arange(len(actual)), 1 + settings]


def _fence(residuals: Floats, settings: NDArray[np.int64], weights: Floats, noise: float) -> tuple[Floats, Floats]:
    """Bounds around each setting's median beyond which a repeat is noise and must not move the correction."""
    each = [weighted_median(residuals[settings == k], weights[settings == k]) for k in range(settings.max() + 1)]
    medians = np.asarray(each)[settings]
    return medians - _OUTLIER * noise, medians + _OUTLIER * noise


def _bootstrap(settings: NDArray[np.int64], draws: int) -> Floats:
    """Weights of the Bayesian bootstrap with settings as units, shape ``(draws, n_rows)``."""
    weights = np.random.default_rng(_SEED).exponential(size=(draws, int(settings.max()) + 1))
    return np.asarray(weights[:, settings], dtype=float)


def _leave_out_weights(settings: NDArray[np.int64]) -> Floats:
    """Weights that leave out each setting in turn, shape ``(n_settings, n_rows)``; a lone setting leaves itself in."""
    count = int(settings.max()) + 1
    if count == 1:
        return np.ones((1, len(settings)))
    return (np.arange(count)[:, None] != settings[None, :]).astype(float)


def _without_held_out(part: Posynomial, draws: int) -> Posynomial:
    return Posynomial(part.terms, part.theta, part.draws[:draws], part.overhead)


def _knob_effects(data: StageData) -> tuple[tuple[str, ...], Floats, StageData]:
    """Log factor of each combination of knob values, and the rows with these factors divided out.

    Combinations are compared at the settings that they share: the factor is the mean over settings of the log time
    against that setting's mean; a second look after the division isn't needed when the sweep is balanced.
    """
    names, which = np.unique(data.points.knobs, return_inverse=True)
    if len(names) < 2:
        return tuple(names.tolist()), np.zeros(len(names)), data
    base = Points.of(data.points.workers, data.points.vcpus, batch=data.points.batch).settings
    logs = np.log(data.wall_s)
    effects = np.zeros(len(names))
    for _ in range(20):
        shared = setting_means(logs - effects[which], base, data.weights)
        effects = setting_means(logs - shared[base], which, data.weights)
    factor = np.exp(effects[which])
    plain = Points.of(
        data.points.workers, data.points.vcpus, upstream=data.points.upstream, items=data.points.items,
        batch=data.points.batch, features=data.points.features,
    )  # fmt: skip
    rows = StageData(plain, data.wall_s / factor, data.busy_s / factor, data.steps_s / factor[:, None], data.weights)
    return tuple(names.tolist()), effects, rows

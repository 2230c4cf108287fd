"""Run-to-run noise: what repeats of one setting show, which does not shrink with more data.

Draws resample whole rows, wall and busy together, as log deviations from their setting's mean; m repeats stand in for
the population by the factor √(m/(m−1)). With ν degrees of freedom the scale itself is uncertain: each draw multiplies
it by √(ν/χ²_ν), so that few repeats give the wider tails of Student's t (Gelman et al., Bayesian Data Analysis, §3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prefect_slo.models.design import Floats, Ints

_BANDWIDTH = 0.3
"""Smoothing of the resampled residuals, in their standard deviations; the variance is kept."""

_FLOOR = 2e-3
"""Least run-to-run standard deviation believed in: clocks and schedulers jitter by 0.2 % even where repeats agree."""


_PRIOR_FREEDOM = 2.0
_OUTLIER = 2.5

_MOST_INFLATION = 4.0
"""Bound of the scale's factor: the mean of exp(Student's t) doesn't exist without one."""


@dataclass(frozen=True)
class Noise:
    """Pooled log deviations of the rows from their setting's mean.

    Attributes:
        wall: Deviations of log wall time, shape ``(n_rows,)``.
        busy: Deviations of log busy time of the same rows.
        weights: Chance of each row to be drawn.
        freedom: Degrees of freedom, ν.
    """

    wall: Floats
    busy: Floats
    weights: Floats
    freedom: float

    @cached_property
    def sigma(self) -> float:
        """Standard deviation of log wall time."""
        return _deviation(self.wall, self.weights)

    @cached_property
    def sigma_busy(self) -> float:
        """Standard deviation of log busy time."""
        return _deviation(self.busy, self.weights)

    def sample(self, n_samples: int, rng: np.random.Generator, *, blocks: int | None = None) -> tuple[Floats, Floats]:
        """Joint draws of the log deviations of wall and busy time, shapes ``(n_samples,)``.

        With ``blocks``, the scale and the rows' chances (a Bayesian bootstrap) are drawn once per block.
        """
        scales = n_samples if blocks is None else blocks
        inflation = np.minimum(np.sqrt(self.freedom / rng.chisquare(self.freedom, scales)), _MOST_INFLATION)
        if blocks is None:
            rows = rng.choice(len(self.wall), n_samples, p=self.weights / self.weights.sum())
        else:
            each = n_samples // blocks
            inflation = np.repeat(inflation, each)
            reached = np.cumsum(self.weights * rng.exponential(size=(blocks, len(self.weights))), axis=1)
            aims = rng.random((blocks, each)) * reached[:, -1:]
            found = [np.searchsorted(chances, aim, side="right") for chances, aim in zip(reached, aims, strict=True)]
            rows = np.minimum(np.concatenate(found), len(self.wall) - 1)
        smooth = rng.standard_normal(n_samples)
        return (
            self._smoothed(self.wall[rows], self.sigma, smooth) * inflation,
            self._smoothed(self.busy[rows], self.sigma_busy, smooth) * inflation,
        )

    @staticmethod
    def _smoothed(deviations: Floats, sigma: float, smooth: Floats) -> Floats:
        smoothed: Floats = (deviations + _BANDWIDTH * sigma * smooth) / np.sqrt(1.0 + _BANDWIDTH**2)
        return smoothed


def fit_noise(log_wall: Floats, log_busy: Floats, settings: Ints, weights: Floats) -> Noise:
    """Noise from log residuals against the basis.

    Settings with repeats give it; without any repeat the residuals themselves stand in, misfit included.

    Args:
        log_wall: Log residuals of wall time, shape ``(n_rows,)``.
        log_busy: Log residuals of busy time.
        settings: Number of the setting of each row.
        weights: Row weights.
    """
    counts = np.bincount(settings)
    repeated = counts[settings] > 1
    freedom = float(np.maximum(counts - 1, 0).sum())
    if not repeated.any():
        return Noise(log_wall, log_busy, weights, max(float(len(log_wall)) - 1.0, 1.0))
    inflate = np.sqrt(counts / np.maximum(counts - 1, 1))[settings]
    wall = (log_wall - setting_means(log_wall, settings, weights)[settings]) * inflate
    busy = (log_busy - setting_means(log_busy, settings, weights)[settings]) * inflate
    return Noise(wall[repeated], busy[repeated], weights[repeated], freedom)


def mean_variances(residuals: Floats, settings: Ints, weights: Floats) -> tuple[float, Floats]:
    """Core standard deviation of the noise, and the variance of each setting's mean, shape ``(n_settings,)``.

    Each setting's variance is its own, shrunk towards the core (which is blind to outliers) with two degrees of
    freedom: where repeats disagree, one of them was hit by something rare, and their mean is worth less.
    """
    counts, mass = np.bincount(settings), np.bincount(settings, weights)
    deviations = residuals - setting_means(residuals, settings, weights)[settings]
    repeated = counts[settings] > 1
    if not repeated.any():
        core = max(1.4826 * weighted_median(np.abs(residuals - weighted_median(residuals, weights)), weights), _FLOOR)
        return core, core**2 / mass
    inflate = np.sqrt(counts / np.maximum(counts - 1, 1))[settings]
    core = max(1.4826 * weighted_median(np.abs(deviations * inflate)[repeated], weights[repeated]), _FLOOR)
    own = np.bincount(settings, weights * deviations**2)
    return core, (_PRIOR_FREEDOM * core**2 + own) / (_PRIOR_FREEDOM + counts - 1) / mass


def without_outliers(values: Floats, settings: Ints, weights: Floats, core: float) -> Floats:
    """Values clipped to 2.5 core deviations around their setting's median; of two repeats the lower is the median."""
    medians = [weighted_median(values[settings == k], weights[settings == k]) for k in range(int(settings.max()) + 1)]
    centre = np.asarray(medians)[settings]
    return np.clip(values, centre - _OUTLIER * core, centre + _OUTLIER * core)


def weighted_median(values: Floats, weights: Floats) -> float:
    """The value at which half of the weight is reached."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, 0.5 * reached[-1])])


def setting_means(values: Floats, settings: Ints, weights: Floats) -> Floats:
    """Weighted mean of the values of each setting, shape ``(n_settings,)``."""
    totals = np.bincount(settings, weights * values)
    means: Floats = totals / np.maximum(np.bincount(settings, weights), 1e-300)
    return means


def _deviation(values: Floats, weights: Floats) -> float:
    return max(float(np.sqrt(np.average(values**2, weights=weights))), _FLOOR)

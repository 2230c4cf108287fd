"""Run-to-run noise: what repeats of one setting show, which does not shrink with more data.

Draws resample whole rows, wall and busy together, as log deviations from the corrected basis. They are not centred
setting by setting, which would make skewed noise symmetric where repeats are few; instead they are widened by the share
of each that the fit and the correction absorbed. With ν degrees of freedom left the scale itself is uncertain: each
draw multiplies it by √(ν/χ²_ν), so that few repeats give the wider tails of Student's t (Gelman et al., Bayesian Data
Analysis, §3.2). For promises with a confidence, the next of n + 1 exchangeable runs is the slowest so far with chance
1/(n + 1), whatever the distribution: about half as often a draw lies beyond the slowest row, by an exponential step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from prefect_slo.models.design import Floats, Ints
from prefect_slo.models.spread import Spread, fit_spread

_BANDWIDTH = 0.3
"""Smoothing of the resampled residuals, in their standard deviations; the variance is kept."""

_FLOOR = 2e-3
"""Least run-to-run standard deviation believed in: clocks and schedulers jitter by 0.2 % even where repeats agree."""

_BEYOND = 0.5
"""Rows' worth of weight that lies beyond the slowest row, as Jeffreys' prior of a share has it. With a whole row as few
of 300 simulated promises were broken (tests/benchmarks/guarantee.py), and they cost 1 % more."""

_PRIOR_FREEDOM = 2.0
_OUTLIER = 2.5
_LEAST_LEFT = 0.2

_PRIOR_SIGMA, _PRIOR_ROWS = 0.05, 1.0
"""What is believed of the noise before any repeat: 5 %, worth one degree of freedom. Few rows can be fitted exactly."""

_MOST_INFLATION = 3.0
"""Bound of the scale's factor: the mean of exp(Student's t) doesn't exist without one."""


@dataclass(frozen=True)
class Noise:
    """Pooled log deviations of the rows from the corrected basis.

    Attributes:
        wall: Deviations of log wall time, shape ``(n_rows,)``.
        busy: Deviations of log busy time of the same rows.
        weights: Chance of each row to be drawn.
        freedom: Degrees of freedom, ν, that of the prior included.
        spread: Where the noise is wider or narrower than these deviations, which are divided by it.
    """

    wall: Floats
    busy: Floats
    weights: Floats
    freedom: float
    spread: Spread = Spread()

    def centre(self, response: Literal["wall", "busy"]) -> float:
        """Mean deviation of log wall or busy time, around which they are scaled."""
        return float(np.average(self.wall if response == "wall" else self.busy, weights=self.weights))

    @cached_property
    def sigma(self) -> float:
        """Standard deviation of log wall time."""
        return _deviation(self.wall, self.weights)

    @cached_property
    def sigma_busy(self) -> float:
        """Standard deviation of log busy time."""
        return _deviation(self.busy, self.weights)

    def median(self, response: Literal["wall", "busy"]) -> float:
        """Median deviation of log wall or busy time."""
        return weighted_median(self.wall if response == "wall" else self.busy, self.weights)

    def sample(self, n_samples: int, rng: np.random.Generator, *, blocks: int | None = None) -> tuple[Floats, Floats]:
        """Joint draws of the log deviations of wall and busy time, shapes ``(n_samples,)``.

        With ``blocks``, the scale and the rows' chances (a Bayesian bootstrap, with one more row beyond the slowest)
        are drawn once per block.
        """
        scales = n_samples if blocks is None else blocks
        inflation = np.minimum(np.sqrt(self.freedom / rng.chisquare(self.freedom, scales)), _MOST_INFLATION)
        if blocks is None:
            rows = _resampled(self.weights, rng.random(n_samples))
        else:
            each = n_samples // blocks
            inflation = np.repeat(inflation, each)
            chances = self._chances * rng.exponential(size=(blocks, len(self._chances)))
            aims = rng.random((blocks, each))
            rows = np.concatenate([_resampled(mine, aim) for mine, aim in zip(chances, aims, strict=True)])
        smooth = rng.standard_normal(n_samples)
        slowest = len(self.wall)
        beyond = np.where(rows == slowest, rng.exponential(size=n_samples), 0.0)
        rows[rows == slowest] = int(np.argmax(self.wall))
        return (
            self._drawn(self.wall, self.sigma, rows, beyond, smooth, inflation),
            self._drawn(self.busy, self.sigma_busy, rows, beyond, smooth, inflation),
        )

    @cached_property
    def _chances(self) -> Floats:
        """Weights of the rows, and of the one that is yet to come beyond the slowest."""
        effective = float(self.weights.sum() ** 2 / np.sum(self.weights**2))
        return np.append(self.weights, _BEYOND * self.weights.sum() / effective)

    def _drawn(
        self, deviations: Floats, sigma: float, rows: Ints, beyond: Floats, smooth: Floats, inflation: Floats
    ) -> Floats:
        """Smoothed around the mean deviation, widened to the posterior scale and by its uncertainty."""
        centre = float(np.average(deviations, weights=self.weights))
        around = (deviations[rows] - centre + _BANDWIDTH * sigma * smooth) / np.sqrt(1.0 + _BANDWIDTH**2)
        known = self.freedom - _PRIOR_ROWS
        posterior = (known * sigma**2 + _PRIOR_ROWS * _PRIOR_SIGMA**2) / self.freedom
        unseen = np.sqrt(max(posterior - sigma**2, 0.0))
        drawn: Floats = centre + (around + unseen * smooth + sigma * beyond) * inflation
        return drawn


def fit_noise(
    wall: Floats, busy: Floats, absorbed: Floats, settings: Ints, weights: Floats, *, terms: int, workers: Floats
) -> Noise:
    """Noise from log deviations against the corrected basis.

    Args:
        wall: Log deviations of wall time, shape ``(n_rows,)``.
        busy: Log deviations of busy time.
        absorbed: Share of each setting's mean deviation that the correction took away, shape ``(n_settings,)``.
        settings: Number of the setting of each row.
        weights: Row weights.
        terms: Coefficients of the basis.
        workers: Workers of each row.
    """
    counts = np.bincount(settings)
    lost = (2.0 * absorbed - absorbed**2) / counts
    # What repeats of a setting differ by is noise whatever the fit absorbed: 1 − 1/n of its variance, n − 1 of freedom.
    left = np.maximum(1.0 - lost[settings] - terms / len(wall), 1.0 - 1.0 / counts[settings])
    left = np.maximum(left, _LEAST_LEFT)
    freedom = max(float(len(wall) - absorbed.sum() - terms), float(np.sum(counts - 1)), 1.0) + _PRIOR_ROWS
    pooled = Noise(_widened(wall, weights, left), _widened(busy, weights, left), weights, freedom)
    wall_centre, busy_centre = pooled.centre("wall"), pooled.centre("busy")
    spread = fit_spread(workers, pooled.wall - wall_centre, weights)
    scale = spread.scale(workers)
    return replace(
        pooled,
        wall=wall_centre + (pooled.wall - wall_centre) / scale,
        busy=busy_centre + (pooled.busy - busy_centre) / scale,
        spread=spread,
    )


def mean_variances(residuals: Floats, settings: Ints, weights: Floats) -> tuple[float, Floats]:
    """Core standard deviation of the noise, and the variance of each setting's mean, shape ``(n_settings,)``.

    Each setting's variance is its own, shrunk towards the core (which is blind to outliers) with two degrees of
    freedom: where repeats disagree, one of them was hit by something rare, and their mean is worth less.
    """
    counts, mass = np.bincount(settings), np.bincount(settings, weights)
    deviations = residuals - setting_means(residuals, settings, weights)[settings]
    repeated = counts[settings] > 1
    if not enough_repeats(settings):
        core = max(1.4826 * weighted_median(np.abs(residuals - weighted_median(residuals, weights)), weights), _FLOOR)
        return core, core**2 / mass
    inflate = np.sqrt(counts / np.maximum(counts - 1, 1))[settings]
    core = max(1.4826 * weighted_median(np.abs(deviations * inflate)[repeated], weights[repeated]), _FLOOR)
    own = np.bincount(settings, weights * deviations**2)
    return core, (_PRIOR_FREEDOM * core**2 + own) / (_PRIOR_FREEDOM + counts - 1) / mass


def enough_repeats(settings: Ints) -> bool:
    """Whether enough settings were repeated to tell noise from misfit: one repeat in four settings, at least 3."""
    counts = np.bincount(settings)
    return int(np.sum(counts - 1)) >= max(3, len(counts) // 4)


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


def _widened(deviations: Floats, weights: Floats, left: Floats) -> Floats:
    centre = float(np.average(deviations, weights=weights))
    widened: Floats = centre + (deviations - centre) / np.sqrt(left)
    return widened


def _resampled(chances: Floats, aims: Floats) -> Ints:
    """Positions drawn with these relative chances, given uniform draws."""
    reached = np.cumsum(chances)
    found = np.searchsorted(reached, aims * reached[-1], side="right")
    return np.asarray(np.minimum(found, len(chances) - 1), dtype=np.int64)


def _deviation(values: Floats, weights: Floats) -> float:
    return max(float(np.sqrt(np.average((values - np.average(values, weights=weights)) ** 2, weights=weights))), _FLOOR)

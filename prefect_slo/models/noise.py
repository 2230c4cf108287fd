"""Run-to-run noise: what repeats of one setting show, which does not shrink with more data.

Draws resample whole rows, wall and busy together, as log deviations from the corrected basis. They are not centred
setting by setting, which would make skewed noise symmetric where repeats are few; instead they are widened by the share
of each that the fit and the correction absorbed. With ν degrees of freedom left the scale itself is uncertain: each
draw multiplies it by √(ν/χ²_ν), so that few repeats give the wider tails of Student's t (Gelman et al., Bayesian Data
Analysis, §3.2); its factors are the midpoint quantiles of that distribution, in random order. For promises with a
confidence, the next of n + 1 exchangeable runs is the slowest so far with chance 1/(n + 1), whatever the distribution:
about half as often a draw lies beyond the slowest row, by an exponential step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri, ndtri

from prefect_slo.models.design import Floats, Ints
from prefect_slo.models.spread import Spread, fit_spread

_BANDWIDTH = 0.3
"""Smoothing of the resampled residuals, in their standard deviations; the variance is kept."""

_FLOOR = 2e-3
"""Least run-to-run standard deviation believed in: clocks and schedulers jitter by 0.2 % even where repeats agree."""

_BEYOND = 0.5
"""Rows' worth of weight that lies beyond the slowest row, as Jeffreys' prior of a share has it. With a whole row as few
of 300 simulated promises were broken (tests/benchmarks/guarantee.py), and they cost 1 % more."""

_SCALES = 256
"""Quantiles that stand for the distribution of the noise's scale."""

_NORMALS = ndtri((np.arange(8192) + 0.5) / 8192)
"""Quantiles that stand for the normal distribution, which smooths: drawing them takes a quarter of the time."""

_PIECE = 25_000
"""Samples drawn at a time."""

_CELLS = 4096
"""Cells of the guide table that rows are drawn by."""

Deviations = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Log deviations of wall and busy time, of the same runs."""

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

    def sample(self, n_samples: int, rng: np.random.Generator, *, blocks: int | None = None) -> Deviations:
        """Joint draws of the log deviations of wall and busy time, shapes ``(n_samples,)``.

        With ``blocks``, the scale and the rows' chances (a Bayesian bootstrap, with one more row beyond the slowest)
        are drawn once per block. Rows are then stratified within each half of a block: every row comes as often as its
        chance says, up to one, so that what blocks differ by is what they stand for and not luck.
        """
        wall, busy = np.empty(n_samples, dtype=np.float32), np.empty(n_samples, dtype=np.float32)
        for some, own, working in self.parts(n_samples, rng, blocks=blocks):
            wall[some], busy[some] = own, working
        return wall, busy

    def parts(
        self, n_samples: int, rng: np.random.Generator, *, blocks: int | None = None
    ) -> Iterator[tuple[slice, Floats, Floats]]:
        """The same piece by piece, each with its place: pieces that stay in the cache take half the time.

        A piece holds whole blocks.
        """
        if blocks is None:
            guide, scales = _Guide.of(self.weights), self._scales(_SCALES)
            for start in range(0, n_samples, _PIECE):
                count = min(_PIECE, n_samples - start)
                inflation = scales[rng.integers(_SCALES, size=count)]
                rows = guide.picked(count, rng)
                yield slice(start, start + count), *self._drawn(rows, None, _smooth(count, rng), inflation)
            return
        each = n_samples // blocks
        scales = rng.permutation(self._scales(blocks))
        chances = self._chances * rng.exponential(size=(blocks, len(self._chances)))
        step = max(_PIECE // each, 1)
        for first in range(0, blocks, step):
            mine = chances[first : first + step]
            halves = [_stratified(mine, size, rng) for size in (each - each // 2, each // 2)]
            rows = np.concatenate(halves, axis=1).ravel()
            last = np.flatnonzero(rows == len(self.wall))
            rows[last] = int(np.argmax(self.wall))
            beyond = np.zeros(len(rows))
            beyond[last] = rng.exponential(size=len(last))
            inflation = np.repeat(scales[first : first + step], each)
            place = slice(first * each, first * each + len(rows))
            yield place, *self._drawn(rows, beyond, _smooth(len(rows), rng), inflation)

    def _scales(self, count: int) -> Floats:
        """Factors of the scale, √(ν/χ²_ν) at evenly spread quantiles, shape ``(count,)``."""
        quantiles = chdtri(self.freedom, (np.arange(count) + 0.5) / count)
        return np.asarray(np.minimum(np.sqrt(self.freedom / quantiles), _MOST_INFLATION), dtype=float)

    @cached_property
    def _chances(self) -> Floats:
        """Weights of the rows, and of the one that is yet to come beyond the slowest."""
        effective = float(self.weights.sum() ** 2 / np.sum(self.weights**2))
        return np.append(self.weights, _BEYOND * self.weights.sum() / effective)

    def _drawn(self, rows: Ints, beyond: Floats | None, smooth: Floats, inflation: Floats) -> tuple[Floats, Floats]:
        """Smoothed around the mean deviation, widened to the posterior scale and by its uncertainty."""
        known, shrink = self.freedom - _PRIOR_ROWS, 1.0 / np.sqrt(1.0 + _BANDWIDTH**2)
        drawn = []
        for deviations, sigma in ((self.wall, self.sigma), (self.busy, self.sigma_busy)):
            centre = float(np.average(deviations, weights=self.weights))
            posterior = (known * sigma**2 + _PRIOR_ROWS * _PRIOR_SIGMA**2) / self.freedom
            unseen = np.sqrt(max(posterior - sigma**2, 0.0))
            around = (shrink * (deviations - centre))[rows]
            around += (shrink * _BANDWIDTH * sigma + unseen) * smooth
            if beyond is not None:
                around += sigma * beyond
            around *= inflation
            around += centre
            drawn.append(around)
        return drawn[0], drawn[1]


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


def _smooth(count: int, rng: np.random.Generator) -> Floats:
    return np.asarray(_NORMALS[rng.integers(len(_NORMALS), size=count)], dtype=float)


@dataclass(frozen=True)
class _Guide:
    """A guide table (Chen and Asau 1974): it answers all draws but those whose cell holds a border.

    Attributes:
        reached: Cumulative chances.
        first: First position of each cell, and one beyond the last.
    """

    reached: Floats
    first: Ints

    @classmethod
    def of(cls, chances: Floats) -> _Guide:
        """Of relative chances."""
        reached = np.cumsum(chances) / np.sum(chances)
        first = np.searchsorted(reached, np.arange(_CELLS + 1) / _CELLS, side="right")
        return cls(reached, np.minimum(first, len(chances) - 1))

    def picked(self, count: int, rng: np.random.Generator) -> Ints:
        """Positions drawn by their chances, shape ``(count,)``."""
        aims = rng.random(count)
        cells = (aims * _CELLS).astype(np.int64)
        rows = self.first[cells]
        border = np.flatnonzero(rows != self.first[cells + 1])
        found = np.searchsorted(self.reached, aims[border], side="right")
        rows[border] = np.minimum(found, len(self.reached) - 1)
        return rows


def _stratified(chances: Floats, count: int, rng: np.random.Generator) -> Ints:
    """Positions by systematic sampling in random order, one row per row of chances, shape ``(n_rows, count)``."""
    reached = np.cumsum(chances, axis=1)
    upto = np.ceil(reached * (count / reached[:, -1:]) - rng.random((len(chances), 1))).astype(np.int64)
    upto[:, -1] = count
    times = np.diff(upto, axis=1, prepend=0)
    rows = np.repeat(np.tile(np.arange(chances.shape[1]), len(chances)), times.ravel())
    return np.asarray(rng.permuted(rows.reshape(len(chances), count), axis=1), dtype=np.int64)


def _deviation(values: Floats, weights: Floats) -> float:
    return max(float(np.sqrt(np.average((values - np.average(values, weights=weights)) ** 2, weights=weights))), _FLOOR)

"""The stage model of Orion (OSDI'22, §4): measured percentiles, interpolated percentile by percentile.

Between two profiled sizes the p-th percentile is interpolated linearly in the size; between two profiled worker counts
the same is done in the logarithm of the count. Beyond the grid the nearest profile holds. A baseline: it has no
parameters, and no notion of the uncertainty of percentiles that come from few runs.

Stages in series add up (``convolve``), workers in parallel take the maximum (``maximum``), with the conditional
correction for workers that are slow together.
"""

from __future__ import annotations

from typing import Self

import numpy as np

from prefect_slo.errors import NotEnoughObservations
from prefect_slo.models.design import Floats, Points, StageData
from prefect_slo.models.protocol import Draws, Response

LEVELS = np.linspace(0.005, 0.995, 100)
"""Probabilities of the stored percentiles: the middle of each per cent."""


class Empirical:
    """Percentiles of wall and busy time by setting."""

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
        self._curves: dict[Response, dict[float, tuple[Floats, Floats]]] = {
            "wall": _curves(data, data.wall_s),
            "busy": _curves(data, data.busy_s),
        }
        return self

    def mean(self, points: Points, response: Response = "wall") -> Floats:
        """Expected seconds at each point, shape ``(n_points,)``."""
        expected: Floats = self.percentiles(points, response).mean(axis=1)
        return expected

    def quantile(self, points: Points, q: float, response: Response = "wall") -> Floats:
        """The ``q``-quantile in seconds at each point, shape ``(n_points,)``."""
        return np.array([np.interp(q, LEVELS, curve) for curve in self.percentiles(points, response)])

    def sample(self, points: Points, n_samples: int, rng: np.random.Generator, *, blocks: int | None = None) -> Draws:
        """Joint draws at each point, shapes ``(n_points, n_samples)``: one percentile per sample for all of them.

        It has no parameters, so that ``blocks`` changes nothing.
        """
        at = rng.random(n_samples)
        wall, busy = (
            np.array([np.interp(at, LEVELS, curve) for curve in self.percentiles(points, response)])
            for response in ("wall", "busy")
        )
        return Draws(wall, np.minimum(busy, wall))

    def percentiles(self, points: Points, response: Response = "wall") -> Floats:
        """Percentiles at ``LEVELS``, shape ``(n_points, 100)``."""
        curves = self._curves[response]
        counts = np.array(sorted(curves))
        result = np.empty((len(points), len(LEVELS)))
        for k, (workers, vcpus) in enumerate(zip(points.workers, points.vcpus, strict=True)):
            below = counts[max(np.searchsorted(counts, workers, side="right") - 1, 0)]
            above = counts[min(np.searchsorted(counts, workers), len(counts) - 1)]
            low, high = _at_size(curves[below], vcpus), _at_size(curves[above], vcpus)
            share = 0.0 if below == above else np.log(workers / below) / np.log(above / below)
            result[k] = low + (high - low) * share
        return result


def convolve(*curves: Floats) -> Floats:
    """Percentiles (at ``LEVELS``) of the sum of independent stages in series, each given by its own percentiles."""
    total = curves[0]
    for curve in curves[1:]:
        total = np.quantile(np.add.outer(total, curve), LEVELS)
    return total


def maximum(curve: Floats, workers: int, conditional: Floats | None = None) -> Floats:
    """Percentiles of the slowest of ``workers`` workers, each with percentiles ``curve`` (at ``LEVELS``).

        P(max ≤ t) = P(X ≤ t)·P(X_k ≤ t | X_j ≤ t)^(n−1)

    Args:
        curve: Percentiles of one worker.
        workers: *n*.
        conditional: P(X_k ≤ t | X_j ≤ t) at the values of ``curve``; that of independent workers by default, for
            which the p-th percentile of the maximum is the p^(1/n)-th of one.
    """
    reached = LEVELS * (LEVELS if conditional is None else conditional) ** (workers - 1)
    slowest: Floats = np.interp(LEVELS, np.maximum.accumulate(reached), curve)
    return slowest


def conditional_share(pairs: Floats, curve: Floats) -> Floats:
    """P(X_k ≤ t | X_j ≤ t) at the values of ``curve``, from pairs of workers of one run, ``(n_pairs, 2)``."""
    first = pairs[:, 0, None] <= curve
    both = first & (pairs[:, 1, None] <= curve)
    share: Floats = (both.sum(axis=0) + LEVELS) / (first.sum(axis=0) + 1.0)
    return share


def _curves(data: StageData, seconds: Floats) -> dict[float, tuple[Floats, Floats]]:
    """Sizes and their percentiles, by number of workers."""
    curves = {}
    for workers in np.unique(data.points.workers):
        mine = data.points.workers == workers
        sizes = np.unique(data.points.vcpus[mine])
        rows = [np.quantile(seconds[mine & (data.points.vcpus == size)], LEVELS) for size in sizes]
        curves[float(workers)] = (sizes, np.stack(rows))
    return curves


def _at_size(curve: tuple[Floats, Floats], vcpus: float) -> Floats:
    sizes, percentiles = curve
    k = int(np.clip(np.searchsorted(sizes, vcpus), 1, max(len(sizes) - 1, 1)))
    if len(sizes) == 1:
        only: Floats = percentiles[0]
        return only
    share = np.clip((vcpus - sizes[k - 1]) / (sizes[k] - sizes[k - 1]), 0.0, 1.0)
    between: Floats = percentiles[k - 1] + (percentiles[k] - percentiles[k - 1]) * share
    return between

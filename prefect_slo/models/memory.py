"""How much memory a worker needs, from peaks measured at inputs of different size.

    peak = (a + b·size)·r,    a, b ≥ 0

with ``r`` the ratio of measured to fitted peaks. The need at an input is the fitted line times the largest ratio seen,
and a margin that shrinks with the number of runs: with n of them the next exceeds the largest with chance 1/(n + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefect_slo.models.design import Floats
from prefect_slo.models.posynomial import nonnegative

_MARGIN = 0.05
"""Least margin above the largest peak: allocators and page caches differ by a few per cent between runs."""

_FEW = 0.5
"""Further margin is this divided by the number of runs: 25 % after two, 5 % after ten."""

_GROWTH = 2.0


@dataclass(frozen=True)
class MemoryNeed:
    """Fitted peak memory of one worker.

    Attributes:
        base_mb: Memory without input, *a*.
        per_size_mb: Memory for an input of typical size 1, *b*.
        ratio: Largest measured peak over the fitted line, at least 1.
        runs: Measured peaks behind it.
    """

    base_mb: float
    per_size_mb: float
    ratio: float
    runs: int

    @classmethod
    def fit(cls, peak_mb: Floats, size: Floats | None = None) -> MemoryNeed | None:
        """Fit to peaks, shape ``(n_rows,)``, and input sizes relative to the typical one; unknown peaks are ``nan``.

        Returns:
            The fit, or ``None`` without any known peak.
        """
        known = np.isfinite(peak_mb) & (peak_mb > 0)
        if not known.any():
            return None
        peaks = peak_mb[known]
        sizes = np.ones(len(peaks)) if size is None else size[known]
        design = np.stack([np.ones(len(peaks)), sizes], axis=1)
        if np.ptp(sizes) < 1e-6:
            design = design[:, :1]
        theta = np.append(nonnegative(design / peaks[:, None], np.ones(len(peaks)), np.ones(len(peaks))), 0.0)[:2]
        fitted = np.maximum(theta[0] + theta[1] * sizes, 1e-9)
        return cls(float(theta[0]), float(theta[1]), max(float(np.max(peaks / fitted)), 1.0), len(peaks))

    def at(self, size: float = 1.0) -> float:
        """Memory in MB that a worker needs for an input of that relative size, margins included."""
        return (self.base_mb + self.per_size_mb * size) * self.ratio * (1.0 + _MARGIN + _FEW / self.runs)

    def smallest_safe(self, memory_mb: Sequence[float], size: float = 1.0) -> float | None:
        """The least of the sizes on offer that holds the need; ``None`` when none does."""
        return min((offered for offered in memory_mb if offered >= self.at(size)), default=None)


def ladder(memory_mb: Sequence[float], failed_mb: float, *, most_mb: float | None = None) -> tuple[float, ...]:
    """Memory of successive tries after a worker of ``failed_mb`` ran out: sizes on offer that at least double.

    Args:
        memory_mb: Sizes on offer.
        failed_mb: Size that was too small.
        most_mb: Nothing above it.

    Returns:
        Ascending sizes. Where doubling passes over the largest on offer, that one ends the ladder.
    """
    above = sorted(m for m in set(memory_mb) if m > failed_mb and (most_mb is None or m <= most_mb))
    steps: list[float] = []
    last = failed_mb
    for offered in above:
        if offered >= _GROWTH * last or offered == above[-1]:
            steps.append(offered)
            last = offered
    return tuple(steps)

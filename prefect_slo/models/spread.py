"""Where the noise is wider or narrower than on average: with the number of workers.

A stage waits for the slowest of d workers, so that d can widen its noise, or narrow it where many items even out: the
log of the deviations' size may have a slope over log d. (A scale of its own for every setting was tried too: it follows
outliers, and predicted the P95 of settings with 300 runs no better than the pooled one.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefect_slo.models.design import Floats

_MOST_GROWTH = float(np.log(2.5))
_BEYOND_DOUBT = 3.0


@dataclass(frozen=True)
class Spread:
    """Factor of the noise's scale by number of workers.

    Attributes:
        growth: Slope of the log scale per doubling of workers; 0 unless the rows show it beyond doubt.
        centre: Logarithm (base 2) of the workers at which the slope changes nothing.
    """

    growth: float = 0.0
    centre: float = 0.0

    def scale(self, workers: Floats) -> Floats:
        """Factor at each number of workers, shape as ``workers``; within 2.5 times either way."""
        exponent = self.growth * (np.log2(workers) - self.centre)
        return np.asarray(np.exp(np.clip(exponent, -_MOST_GROWTH, _MOST_GROWTH)), dtype=float)


def fit_spread(workers: Floats, deviations: Floats, weights: Floats) -> Spread:
    """Learn from centred deviations of the rows; the slope is shrunk by its own uncertainty.

    Args:
        workers: Of each row.
        deviations: Log deviations from the corrected basis, of mean 0, shape ``(n_rows,)``.
        weights: Row weights.
    """
    x = np.log2(workers)
    centre = float(np.average(x, weights=weights))
    variance = float(np.average((x - centre) ** 2, weights=weights))
    if variance < 0.1:
        return Spread(0.0, centre)
    sigma = np.sqrt(float(np.average(deviations**2, weights=weights))) + 1e-12
    size = np.log(np.abs(deviations) + 0.1 * sigma)
    slope = float(np.average((x - centre) * size, weights=weights)) / variance
    t = abs(slope) / (float(np.std(size)) / np.sqrt(variance * len(x)) + 1e-12)
    return Spread(slope * (1.0 - 1.0 / t**2), centre) if t > _BEYOND_DOUBT else Spread(0.0, centre)

"""What the basis misses at a setting, shrunk towards 0 and shared with its neighbours.

Log residuals of the settings are a Gaussian process over (log workers, log vCPUs, log batch, log upstream):

    g ~ N(0, a²·k + b²·1[same setting]),     mean residual of setting i = g_i + N(0, σ²/m_i)

``a`` is misfit that neighbours share, ``b`` misfit of one setting alone, σ the run-to-run noise known from repeats. The
posterior mean corrects the basis (a setting measured often and far off is believed, one measured once is shrunk); its
covariance is parameter uncertainty. Universal kriging, with the posynomial as trend (Cressie 1993, §3.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prefect_slo.models.design import Floats, Points

_LENGTHS = ((0.7, 0.35), (1.5, 0.35), (0.7, 1.0), (1.5, 1.0))
"""Correlation lengths tried, in doublings of workers and of vCPUs."""

_SHARED = (0.0, 0.5, 1.0, 2.0)
_ALONE = (0.3, 0.6, 1.0, 2.0)
"""Standard deviations tried for ``a`` and ``b``, as multiples of the run-to-run noise."""

_CLIP = 4.0


@dataclass(frozen=True)
class Correction:
    """Posterior of log residuals over settings.

    Attributes:
        at: Coordinates of the measured settings, shape ``(n_settings, n_dims)``.
        residuals: Mean log residual of each, shape ``(n_settings,)``.
        variances: Variance of each of these means, σ²/m.
        shared: Standard deviation of misfit shared with neighbours, *a*.
        alone: Standard deviation of misfit of one setting, *b*.
        lengths: Correlation length per dimension.
    """

    at: Floats
    residuals: Floats
    variances: Floats
    shared: float
    alone: float
    lengths: Floats

    @cached_property
    def _inverse(self) -> Floats:
        return np.asarray(np.linalg.inv(self._prior(self.at, self.at) + np.diag(self.variances)), dtype=float)

    def _prior(self, left: Floats, right: Floats) -> Floats:
        kernel = _kernel(left, right, self.lengths)
        return np.asarray(self.shared**2 * kernel + self.alone**2 * (kernel > 1.0 - 1e-9), dtype=float)

    def mean(self, points: Points) -> Floats:
        """Posterior mean of the log residual, shape ``(n_points,)``."""
        return self._prior(points.coordinates, self.at) @ (self._inverse @ self.residuals)

    def covariance(self, points: Points) -> Floats:
        """Posterior covariance over the points, shape ``(n_points, n_points)``."""
        across = self._prior(points.coordinates, self.at)
        return self._prior(points.coordinates, points.coordinates) - across @ self._inverse @ across.T

    def factor(self, points: Points) -> Floats:
        """A square root of ``covariance``, for draws: shape ``(n_points, n_points)``."""
        values, vectors = np.linalg.eigh(self.covariance(points))
        root: Floats = vectors * np.sqrt(np.maximum(values, 0.0))
        return root

    @cached_property
    def misfit(self) -> Floats:
        """Residual of each measured setting in standard deviations of run-to-run noise: above 3 the basis is wrong."""
        return np.abs(self.residuals) / np.sqrt(self.variances)


def fit_correction(
    coordinates: Floats, residuals: Floats, held_out: Floats, variances: Floats, noise: float
) -> Correction:
    """Choose ``a``, ``b`` and the lengths by the likelihood of residuals of settings left out of the fit.

    Args:
        coordinates: Settings, shape ``(n_settings, 4)``.
        residuals: In-sample mean log residuals, which the posterior corrects.
        held_out: The same from fits without each setting: their spread is what a new setting will show.
        variances: σ²/m of each setting.
        noise: σ.
    """
    clipped = np.clip(held_out, -_CLIP * _spread(held_out), _CLIP * _spread(held_out))
    grid = [(lengths, a, b) for lengths in _LENGTHS for a in _SHARED for b in _ALONE if a or lengths is _LENGTHS[0]]
    kernels = {lengths: _kernel(coordinates, coordinates, _per_dimension(lengths)) for lengths in _LENGTHS}
    matrices = noise**2 * np.stack([a**2 * kernels[lengths] + b**2 * np.eye(len(clipped)) for lengths, a, b in grid])
    matrices += np.diag(variances)
    logdet = np.linalg.slogdet(matrices)[1]
    fit = np.linalg.solve(matrices, np.broadcast_to(clipped[:, None], (len(grid), len(clipped), 1)))[:, :, 0] @ clipped
    lengths, a, b = grid[int(np.argmin(logdet + fit))]
    return Correction(coordinates, residuals, variances, a * noise, b * noise, _per_dimension(lengths))


def _kernel(left: Floats, right: Floats, lengths: Floats) -> Floats:
    gaps = (left[:, None, :] - right[None, :, :]) / lengths
    kernel: Floats = np.exp(-0.5 * np.sum(gaps**2, axis=2))
    return kernel


def _per_dimension(doublings: tuple[float, float]) -> Floats:
    return np.array([doublings[0], doublings[1], doublings[0], doublings[0]])


def _spread(values: Floats) -> float:
    return float(1.4826 * np.median(np.abs(values)) + 1e-6)

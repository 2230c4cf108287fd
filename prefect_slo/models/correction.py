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
from scipy.special import ndtri

from prefect_slo.models.design import Floats, Points

_LENGTHS = ((1.5, 0.12), (3.0, 0.12), (0.7, 0.35), (1.5, 0.35), (0.7, 1.0), (1.5, 1.0))
"""Correlation lengths tried, in doublings of workers and of vCPUs."""

_SHARED = (0.0, 0.5, 1.0, 2.0)
_ALONE = (0.3, 0.6, 1.0, 2.0)
"""Standard deviations tried for ``a`` and ``b``, as multiples of the run-to-run noise."""

_CLIP = 4.0
_ODD = 3.0
_SAME = 1e-9


@dataclass(frozen=True)
class Correction:
    """Posterior of log residuals over settings.

    Attributes:
        at: Coordinates of the measured settings, shape ``(n_settings, n_dims)``.
        residuals: Mean log residual of each, against the point estimate of the basis (first column) and each of its
            parameter draws: shape ``(n_settings, 1 + n_draws)``.
        variances: Variance of each of these means, about σ²/m.
        shared: Variance a² of misfit shared with neighbours, one per row of ``lengths``.
        lengths: Correlation lengths, shape ``(n_kernels, n_dims)``.
        alone: Variance b² of misfit of each measured setting alone, shape ``(n_settings,)``.
        elsewhere: The same of any other setting.
        by_upstream: Whether settings differ by upstream workers: only where the stage's own workers never vary.
    """

    at: Floats
    residuals: Floats
    variances: Floats
    shared: Floats
    lengths: Floats
    alone: Floats
    elsewhere: float
    by_upstream: bool

    @cached_property
    def _inverse(self) -> Floats:
        return np.asarray(np.linalg.inv(self._prior(self.at) + np.diag(self.variances)), dtype=float)

    @cached_property
    def _pulls(self) -> Floats:
        pulls: Floats = self._inverse @ self.residuals
        return pulls

    def _prior(self, left: Floats, right: Floats | None = None) -> Floats:
        """Covariance of misfit between coordinates, those of the measured settings by default on the right."""
        right = self.at if right is None else right
        squared = (left[:, None, :] - right[None, :, :]) ** 2
        alone = np.sqrt(np.outer(self._alone(left), self._alone(right)))
        kernels = np.exp(-0.5 * squared @ (1.0 / self.lengths**2).T)
        return np.asarray(alone * (squared.sum(axis=2) < _SAME) + kernels @ self.shared, dtype=float)

    def _alone(self, coordinates: Floats) -> Floats:
        if coordinates is self.at:
            return self._alone_here
        same = np.sum((coordinates[:, None, :] - self.at[None, :, :]) ** 2, axis=2) < _SAME
        return np.where(same.any(axis=1), np.max(np.where(same, self.alone, 0.0), axis=1), self.elsewhere)

    @cached_property
    def _alone_here(self) -> Floats:
        return self._alone(self.at.copy())

    def mean(self, points: Points) -> Floats:
        """Posterior mean of the log residual, shape ``(n_points,)``."""
        mean: Floats = self._prior(where(points, self.by_upstream)) @ self._pulls[:, 0]
        return mean

    def draws(self, points: Points, rng: np.random.Generator) -> Floats:
        """Joint draws over the points, one given each parameter draw of the basis: shape ``(n_points, n_draws)``.

        The normals are stratified per direction, so that a few draws have the right mean and variance.
        """
        distinct, back = where(points, self.by_upstream), np.zeros(1, dtype=np.int64)
        if len(points) > 1:
            distinct, back = np.unique(distinct, axis=0, return_inverse=True)
        across = self._prior(distinct)
        covariance = self._prior(distinct, distinct) - across @ self._inverse @ across.T
        values, vectors = np.linalg.eigh(covariance)
        factor = vectors * np.sqrt(np.maximum(values, 0.0))
        n_draws = self.residuals.shape[1] - 1
        strata = ndtri((np.arange(n_draws) + 0.5) / n_draws)
        normals = rng.permuted(np.broadcast_to(strata / strata.std(), (len(distinct), n_draws)), axis=1)
        drawn: Floats = across @ self._pulls[:, 1:] + factor @ normals
        return drawn[back.ravel()]

    @cached_property
    def at_settings(self) -> Floats:
        """Posterior mean at the measured settings, shape ``(n_settings,)``."""
        corrected: Floats = self._prior(self.at) @ self._pulls[:, 0]
        return corrected

    @cached_property
    def absorbed(self) -> Floats:
        """Share of each setting's own mean residual that its correction takes over, in [0, 1]."""
        share: Floats = np.clip(np.einsum("ij,ji->i", self._prior(self.at), self._inverse), 0.0, 1.0)
        return share

    @cached_property
    def misfit(self) -> Floats:
        """Residual of each measured setting in standard deviations of its mean: above 4 the basis is wrong there."""
        return np.abs(self.residuals[:, 0]) / np.sqrt(self.variances)


def where(points: Points, by_upstream: bool) -> Floats:
    """Coordinates of the points as the correction sees them, shape ``(n_points, 4)``."""
    coordinates = points.coordinates.copy()
    if not by_upstream:
        coordinates[:, 3] = 0.0
    return coordinates


def fit_correction(
    points: Points, residuals: Floats, held_out: Floats, variances: Floats, noise: float, *, repeated: bool = True
) -> Correction:
    """Weigh ``a``, ``b`` and the lengths by the likelihood of residuals of settings left out of the fit.

    The prior is the mean of all candidates, weighted: a mixture is steadier than the best of some 80 on 20 settings.

    Args:
        points: The measured settings.
        residuals: In-sample mean log residuals, which the posterior corrects; shape ``(n_settings, 1 + n_draws)``.
        held_out: Mean log residuals against fits without each setting: their spread is what a new one will show.
        variances: Variance of each mean, about σ²/m.
        noise: σ, the unit of the candidates.
        repeated: Whether repeats tell noise from misfit. Without, what one setting shows alone counts as noise, and
            only what neighbours share is corrected.
    """
    by_upstream = len(np.unique(points.workers)) == 1
    at = where(points, by_upstream)
    bound = _CLIP * (1.4826 * float(np.median(np.abs(held_out))) + 1e-6)
    clipped = np.clip(held_out, -bound, bound)
    grid = [(lengths, a, b) for lengths in _LENGTHS for a in _SHARED for b in _ALONE if a or lengths is _LENGTHS[0]]
    squared = (at[:, None, :] - at[None, :, :]) ** 2
    same = squared.sum(axis=2) < _SAME
    kernels = {lengths: np.exp(-0.5 * squared @ (1.0 / _per_dimension(lengths) ** 2)) for lengths in _LENGTHS}
    matrices = noise**2 * np.stack([a**2 * kernels[lengths] + b**2 * same for lengths, a, b in grid])
    matrices += np.diag(variances)
    logdet = np.linalg.slogdet(matrices)[1]
    fit = np.linalg.solve(matrices, np.broadcast_to(clipped[:, None], (len(grid), len(clipped), 1)))[:, :, 0] @ clipped
    odds = np.exp(-0.5 * (logdet + fit - np.min(logdet + fit)))
    odds /= odds.sum()
    shared = dict.fromkeys(_LENGTHS, 0.0)
    for (lengths, a, _), share in zip(grid, odds, strict=True):
        shared[lengths] += share * (a * noise) ** 2
    alone = float(np.dot(odds, [(b * noise) ** 2 for _, _, b in grid])) if repeated else 0.0
    # Misfit has heavy tails: a setting far outside what the others allow for is believed as far as its repeats agree.
    mean = residuals[:, 0]
    odd = repeated & (mean**2 > _ODD**2 * (alone + sum(shared.values()) + variances))
    per_kernel = np.stack([_per_dimension(doublings) for doublings in shared])
    return Correction(
        at,
        residuals,
        variances,
        np.array(list(shared.values())),
        per_kernel,
        np.where(odd, mean**2, alone),
        alone,
        by_upstream,
    )


def no_correction(points: Points, residuals: Floats, variances: Floats) -> Correction:
    """A correction that is 0 everywhere, for comparison."""
    n_dims = points.coordinates.shape[1]
    return Correction(
        where(points, True),
        residuals,
        variances,
        np.zeros(1),
        np.ones((1, n_dims)),
        np.zeros(len(variances)),
        0.0,
        True,
    )


def _per_dimension(doublings: tuple[float, float]) -> Floats:
    return np.array([doublings[0], doublings[1], doublings[0], doublings[0]])

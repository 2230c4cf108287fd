"""Non-negative least squares on relative error, robust to outliers, with draws of its parameters.

    minimise  Σ_i ω_i·ρ((y_i − θ·φ(x_i)) / s_i)   subject to  θ ≥ 0

where ``s`` is the time of the whole stage, so that each row counts by its relative error and a small step of a long
stage gets a small say; ρ is Huber's loss. Non-negativity alone makes the solution sparse: of some 15 terms 2 to 5
survive (Slawski and Hein, 2013, on why).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from prefect_slo.models.basis import Level, dictionary, select
from prefect_slo.models.design import Floats, Points
from prefect_slo.models.noise import weighted_median

_HUBER = 1.5
_ROUNDS = 4
_RIDGE = 1e-9


@dataclass(frozen=True)
class Posynomial:
    """A fitted sum of terms.

    Attributes:
        terms: Names of the terms with a positive coefficient in any draw.
        theta: Point estimate, shape ``(n_terms,)``.
        draws: Parameter draws, shape ``(n_draws, n_terms)``.
        overhead: Whether the terms come from the dictionary of overheads.
    """

    terms: tuple[str, ...]
    theta: Floats
    draws: Floats
    overhead: bool = False

    def at(self, points: Points) -> Floats:
        """Point estimate in seconds, shape ``(n_points,)``."""
        return self._design(dictionary(points, overhead=self.overhead), len(points)) @ self.theta

    def draws_at(self, points: Points) -> Floats:
        """Every parameter draw in seconds, shape ``(n_points, n_draws)``."""
        return self.draws_of(dictionary(points, overhead=self.overhead), len(points))

    def draws_of(self, terms: Mapping[str, Floats], n_points: int) -> Floats:
        """The same, given the dictionary at the points."""
        return self._design(terms, n_points) @ self.draws.T

    def _design(self, terms: Mapping[str, Floats], n_points: int) -> Floats:
        """This sum's terms, shape ``(n_points, n_terms)``."""
        columns = [terms[name] for name in self.terms]
        return np.stack(columns, axis=1) if columns else np.zeros((n_points, 0))


def fit_posynomial(
    points: Points, y: Floats, scale: Floats, weights: Floats, resamples: Floats, *,
    level: Level = "rich", overhead: bool = False,
) -> Posynomial:  # fmt: skip
    """Fit ``y`` (seconds) on the dictionary.

    Args:
        points: Setting of each row.
        y: Time to explain, shape ``(n_rows,)``.
        scale: Time of the whole stage in each row; residuals are divided by it.
        weights: Row weights.
        resamples: Row weights of each parameter draw, shape ``(n_draws, n_rows)``.
        level: Dictionary to use.
        overhead: Use the dictionary of overheads.
    """
    terms = dictionary(points, level, overhead=overhead)
    names = select(terms, 1.0 / scale)
    design = np.stack([terms[name] for name in names], axis=1) / scale[:, None]
    target = y / scale
    norms = np.linalg.norm(design, axis=0)
    design = design / norms
    robust = np.ones(len(y))
    theta = np.zeros(len(names))
    for _ in range(_ROUNDS):
        theta = nonnegative(design, target, weights * robust)
        robust = huber_weights(target - design @ theta, weights)
    active = theta > 0
    draws = batched_nonnegative(design[:, active], target, resamples * weights * robust)
    kept = tuple(name for name, on in zip(names, active, strict=True) if on)
    return Posynomial(kept, theta[active] / norms[active], draws / norms[active], overhead)


def nonnegative(design: Floats, target: Floats, weights: Floats) -> Floats:
    """θ ≥ 0 that minimises Σ weights·(target − design·θ)², shape ``(n_terms,)``."""
    root = np.sqrt(weights)
    theta: Floats = nnls(design * root[:, None], target * root)[0]
    return theta


def batched_nonnegative(design: Floats, target: Floats, weights: Floats) -> Floats:
    """The same for many weightings at once, shape ``(n_draws, n_terms)``.

    Terms that come out negative are fixed at 0 and the rest solved again, until none is: the active-set step of
    Lawson and Hanson without its way back, which is exact unless a removed term would have returned.
    """
    n_draws, n_terms = len(weights), design.shape[1]
    if n_terms == 0:
        return np.zeros((n_draws, 0))
    gram = np.einsum("bi,ij,ik->bjk", weights, design, design, optimize=True)
    moment = (weights * target) @ design
    ridge = _RIDGE * np.trace(gram, axis1=1, axis2=2)[:, None] + 1e-300
    free = np.ones((n_draws, n_terms), dtype=bool)
    for _ in range(n_terms):
        both = free[:, :, None] & free[:, None, :]
        system = np.where(both, gram, 0.0)
        diagonal = np.einsum("bjj->bj", system)
        diagonal += np.where(free, ridge, 1.0)
        theta: Floats = np.linalg.solve(system, np.where(free, moment, 0.0)[:, :, None])[:, :, 0]
        negative = theta < 0
        if not negative.any():
            return theta
        free &= ~negative
    return np.maximum(theta, 0.0)


def huber_weights(residuals: Floats, weights: Floats) -> Floats:
    """Weights in (0, 1] that bound the pull of residuals beyond 1.5 robust standard deviations."""
    spread = 1.4826 * weighted_median(np.abs(residuals), weights) + 1e-12
    return 1.0 / np.maximum(1.0, np.abs(residuals) / (_HUBER * spread))

r"""Posynomials of a stage's time and cost, fitted to a table with coefficients ≥ 0.

With *d* workers of *v* vCPU, *u* upstream workers and (where known) *n* calls,

    T(d, v, u) = θ₀ + θ₁/d + θ₂/v + θ₃/(d·v) + θ₄/√(d·v) + θ₅/√d + Σ_c θ_c·max(1/(d·v), 1/(d·c)) + θ₆·max(1/(d·v), 1/n)
                 + θ₇·u + θ₈·u/v

with one *c* for each measured number of vCPUs but the least and the most.
Every term is a monomial or a maximum of monomials, so T is convex in log d and log v. The cap ``min(v, c)`` and the
granularity ``⌈n/(d·v)⌉/n`` enter by maxima; the latter by its minorant, since a ceiling is not convex.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Monomial:
    """``scale · d^workers · v^vcpus · u^upstream`` with ``upstream`` 0 or 1."""

    scale: float = 1.0
    workers: float = 0.0
    vcpus: float = 0.0
    upstream: int = 0

    def __call__(self, d: Floats, v: Floats, u: Floats) -> Floats:
        """Its value, arrays of one shape."""
        return np.asarray(self.scale * d**self.workers * v**self.vcpus * (u if self.upstream else 1.0))


@dataclass(frozen=True)
class Term:
    """A coefficient ≥ 0 times the largest of some monomials."""

    coefficient: float
    monomials: tuple[Monomial, ...]

    def __call__(self, d: Floats, v: Floats, u: Floats) -> Floats:
        """Its value, arrays of one shape."""
        return np.asarray(self.coefficient * np.maximum.reduce([monomial(d, v, u) for monomial in self.monomials]))


@dataclass(frozen=True)
class Posynomial:
    """A sum of terms, with how well it fits.

    Attributes:
        terms: Those with a coefficient above 0.
        error: Mean absolute relative error on the options that it was fitted to.
    """

    terms: tuple[Term, ...]
    error: float

    def __call__(self, workers: Floats, vcpus: Floats, upstream: Floats | float = 0.0) -> Floats:
        """Its value at settings, arrays that broadcast."""
        d, v, u = np.broadcast_arrays(np.asarray(workers, float), np.asarray(vcpus, float), np.asarray(upstream, float))
        return np.asarray(sum((term(d, v, u) for term in self.terms), np.zeros(d.shape)))


def fit(workers: Floats, vcpus: Floats, upstream: Floats, values: Floats, *, calls: int | None = None) -> Posynomial:
    """Non-negative least squares on relative error.

    Args:
        workers: *d* of each point, ``(n_points,)``.
        vcpus: *v*.
        upstream: *u*, 0 where nothing depends on it.
        values: Positive values to fit.
        calls: *n*, where the fan-out is given by the data.
    """
    terms = [Term(1.0, (Monomial(),)), *(Term(1.0, (Monomial(1.0, d, v),)) for d, v in _POWERS)]
    caps = sorted({float(v) for v in vcpus})[1:-1]
    terms += [Term(1.0, (Monomial(1.0, -1, -1), Monomial(1.0 / c, -1, 0))) for c in caps]
    if calls:
        terms.append(Term(1.0, (Monomial(1.0, -1, -1), Monomial(1.0 / calls))))
    if np.ptp(upstream) > 0:
        terms += [Term(1.0, (Monomial(1.0, 0, 0, 1),)), Term(1.0, (Monomial(1.0, 0, -1, 1),))]
    basis = np.stack([term(workers, vcpus, upstream) for term in terms], axis=1)
    relative = basis / values[:, None]
    scale = np.linalg.norm(relative, axis=0)
    coefficients = nnls(relative / scale, np.ones(len(values)))[0] / scale
    kept = tuple(Term(float(c), term.monomials) for c, term in zip(coefficients, terms, strict=True) if c > 0)
    return Posynomial(kept, float(np.abs(relative @ coefficients - 1).mean()))


_POWERS = ((-1.0, 0.0), (0.0, -1.0), (-1.0, -1.0), (-0.5, -0.5), (-0.5, 0.0))

r"""Time and cost of a stage in continuous workers and vCPUs: the published formula, one set of coefficients a sample.

    T(d, v, u) = θ₀ + θ₁/d + θ₂/(d·v) + θ₃·ln X / X + θ₄/X² + θ₅·u        X = d·v or d, whichever fits better

(Jolteon, NSDI 2024, §4.1; a stage of one worker has θ₀ + θ₁/v + θ₂·ln v/v + θ₃/v² + θ₄·u). Coefficients come from
unconstrained least squares over the menu's options, as published, so a response may fall below 0 or be non-convex.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.problem import CompiledStage

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Form:
    """Which terms a formula has.

    Attributes:
        single: The stage always runs one worker.
        cores: X is d·v rather than d.
        upstream: Whether time depends on the parents' workers.
    """

    single: bool
    cores: bool
    upstream: bool

    def terms(self, d: Floats, v: Floats, u: Floats) -> Floats:
        """Terms at points, ``(n_points, n_terms)``."""
        size = v if self.single else d * v if self.cores else d
        shares = [1 / v] if self.single else [1 / d, 1 / (d * v)]
        above = [u] if self.upstream else []
        return np.stack([np.ones_like(d), *shares, np.log(size) / size, 1 / size**2, *above], axis=1)


@dataclass(frozen=True, eq=False)
class Response:
    """A formula with its coefficients.

    Attributes:
        form: Its terms.
        priced: Terms are multiplied by d·v, and d is one more: a cost rather than a time.
        theta: ``(n_samples, n_terms)``.
    """

    form: Form
    priced: bool
    theta: Floats

    def terms(self, d: float, v: float, u: float) -> Floats:
        """Terms and their derivatives by d, v and u, ``(4, n_terms)``."""
        return terms(self.form, d, v, u, priced=self.priced)


def terms(form: Form, d: float, v: float, u: float, *, priced: bool) -> Floats:
    """Terms and their derivatives by d, v and u, ``(4, n_terms)``; see ``Response``."""
    values = form.terms(*(np.array([x], dtype=float) for x in (d, v, u)))[0]
    size, by_d, by_v = (v, 0.0, 1.0) if form.single else (d * v, v, d) if form.cores else (d, 1.0, 0.0)
    log_slope, square_slope = (1 - np.log(size)) / size**2, -2 / size**3
    shares = [(0.0, -1 / v**2)] if form.single else [(-1 / d**2, 0.0), (-1 / (d * d * v), -1 / (d * v * v))]
    steps = [(log_slope * by_d, log_slope * by_v), (square_slope * by_d, square_slope * by_v)]
    slopes = np.zeros((3, len(values)))
    slopes[:2, : 1 + len(shares) + 2] = np.array([(0.0, 0.0), *shares, *steps]).T
    slopes[2, 1 + len(shares) + 2 :] = 1.0
    if not priced:
        return np.vstack([values, slopes])
    product = np.vstack([d * v * values, d * v * slopes + np.outer([v, d, 0.0], values)])
    return np.column_stack([product, [d, 1.0, 0.0, 0.0]])


def fit_response(
    stage: CompiledStage, options: NDArray[np.intp], values: NDArray[np.floating], *, priced: bool
) -> Response:
    """Least squares of a stage's table on the published formula.

    Args:
        stage: The stage.
        options: Positions of the options that are fitted.
        values: ``(n_upstream, n_options, n_samples)``, of all options.
        priced: Whether they are costs.
    """
    d = stage.workers[options].astype(float)
    v = np.array([stage.options[o].size.vcpus for o in options])
    above = np.array(sorted(stage.upstream) or [0], dtype=float)
    rows = [stage.upstream[int(u)] for u in above] if stage.upstream else [0]
    target = values[rows][:, options].reshape(len(rows) * len(options), -1).astype(float)
    single = len(np.unique(d)) == 1
    best: tuple[float, Response] | None = None
    for cores in (True, False):
        form = Form(single, cores, bool(stage.upstream))
        design = np.stack([terms(form, a, b, u, priced=priced)[0] for u in above for a, b in zip(d, v, strict=True)])
        scale = np.linalg.norm(design, axis=0)
        theta = (np.linalg.pinv(design / scale) @ target) / scale[:, None]
        typical = target.mean(axis=1)
        error = float(np.abs(design @ theta.mean(axis=1) / np.maximum(typical, 1e-300) - 1).mean())
        if best is None or error < best[0]:
            best = error, Response(form, priced, np.ascontiguousarray(theta.T))
    assert best is not None
    return best[1]

"""Terms of the posynomial: non-increasing in workers and vCPUs, non-decreasing in upstream workers, items and input.

Work splits into *load* (what the busiest worker gets: 1/d of divisible work, or ⌈⌈n/b⌉/d⌉·b items), running at a
*speed* of v vCPUs that may stop helping at a cap c, and parts that don't divide. See Ditto (SIGCOMM'23, §3: a/d + b)
and Jolteon (NSDI'24, §4: S/(d·min(vW, B)) and powers for x·ln x work); here every coefficient is at least 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prefect_slo.models.design import Floats, Points

CAPS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""vCPUs that code may be unable to exceed: 1/min(v, c) = max(1/v, 1/c)."""

CHUNKS = (16, 32, 64)
"""Indivisible pieces that the work may consist of: ⌈n/(d·v)⌉/n, e.g. 32 trees can't use 64 cores."""

_DISTINCT = 1e-6
"""Columns closer than this (relative, in any row) are one term; the simpler one, which comes first, is kept."""


def dictionary(points: Points, *, overhead: bool = False) -> dict[str, Floats]:
    """Every term at every point, simplest first; names are stable, so that a fit can be evaluated elsewhere.

    Args:
        points: Where.
        overhead: Also terms for what grows with the number of workers: start-up, dispatch, waiting for the slowest
            of d (the expected maximum of d draws grows like ln d).

    Returns:
        Columns of shape ``(n_points,)`` by name.
    """
    terms = dict(_plain(points))
    if overhead:
        terms["ln d"] = np.log(points.workers)
        terms["ln d·load"] = np.log(points.workers) * points.load
        terms["d"] = points.workers
    scaled = {}
    for k in range(points.features.shape[1]):
        size = points.features[:, k]
        for name in ("1", "1/v", "load", "load/v"):
            scaled[f"{name}·s{k}"] = terms[name] * size
    return terms | scaled


def select(terms: dict[str, Floats], weights: Floats) -> list[str]:
    """Names of the terms that are not zero everywhere and not a multiple of a simpler one on these rows.

    Args:
        terms: Columns by name, simplest first.
        weights: Row weights that the fit will use, shape ``(n_rows,)``.
    """
    kept: list[str] = []
    units: list[Floats] = []
    for name, column in terms.items():
        values = column * weights
        norm = float(np.linalg.norm(values))
        if norm <= 0 or not np.isfinite(norm):
            continue
        unit = values / norm
        if all(np.max(np.abs(unit - other)) > _DISTINCT for other in units):
            kept.append(name)
            units.append(unit)
    return kept


def _plain(points: Points) -> Iterator[tuple[str, Floats]]:
    d, v, u, load = points.workers, points.vcpus, points.upstream, points.load
    speeds = [("", np.ones_like(v)), ("/v", 1.0 / v), *((f"/min(v,{c:g})", 1.0 / np.minimum(v, c)) for c in CAPS)]
    for name, speed in speeds:
        yield f"1{name}", speed
    for name, speed in speeds:
        yield f"load{name}", load * speed
    yield "load^1.5/v^1.5", (load / v) ** 1.5
    yield "load^1.5", load**1.5
    yield "load/v²", load / v**2
    yield "√load", np.sqrt(load)
    given = points.items > 0
    for pieces in CHUNKS:
        yield f"⌈{pieces}/dv⌉", np.where(given, 0.0, np.ceil(pieces / (d * v) - 1e-9) / pieces)
    for name, speed in speeds[:3]:
        yield f"waves{name}", np.where(given, points.waves * speed, 0.0)
        yield f"n/d{name}", np.where(given, points.share * speed, 0.0)
    yield "n", points.items
    yield "n/b", np.where(given, np.ceil(points.items / points.batch), 0.0)
    for name, speed in speeds[:3]:
        yield f"u{name}", u * speed
    yield "u/d", np.where(given, 0.0, u / d)

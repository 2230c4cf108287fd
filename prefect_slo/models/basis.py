"""Terms of the posynomial: non-increasing in workers and vCPUs, non-decreasing in upstream workers, items and input.

Work splits into *load* (what the busiest worker gets: 1/d of divisible work, or ⌈⌈n/b⌉/d⌉·b items), running at the
*speed* of v vCPUs that may stop helping at a cap, and parts that don't divide. Caps are of one worker, 1/min(v, c) for
code that can't use more than c cores, or of the whole stage, 1/min(d·v, P): P pieces can't use more than P cores, which
is the convex minorant of the granularity ⌈P/(d·v)⌉/P. See Ditto (SIGCOMM'23, §3: a/d + b) and Jolteon (NSDI'24, §4:
S/(d·min(vW, B)), and powers above 1 for x·ln x work); here every coefficient is at least 0.

Dictionaries come in three levels, each with the terms of the one before. A stage gets the simplest that predicts
settings left out of the fit about as well as the best does (``whitebox.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from prefect_slo.models.design import Floats, Points

Level = Literal["plain", "upstream", "rich"]
LEVELS: tuple[Level, ...] = ("plain", "upstream", "rich")

CAPS = (1.0, 2.0, 4.0)
"""vCPUs that the code of one worker may be unable to exceed."""

PIECES = (8, 16, 32, 64, 128)
"""Cores that the whole stage may be unable to exceed, because its work comes in so many pieces."""

_DISTINCT = 1e-6
"""Columns closer than this (relative, in any row) are one term; the simpler one, which comes first, is kept."""


def dictionary(points: Points, level: Level = "rich", *, overhead: bool = False) -> dict[str, Floats]:
    """Terms at every point, simplest first; names are stable, so that a fit can be evaluated elsewhere.

    Args:
        points: Where.
        level: ``plain`` has no upstream workers, ``upstream`` has, ``rich`` adds powers and steps.
        overhead: Also terms for what grows with the number of workers: start-up, dispatch, waiting for the slowest
            of d (the expected maximum of d draws grows like ln d).

    Returns:
        Columns of shape ``(n_points,)`` by name.
    """
    terms = dict(_plain(points))
    for k in range(points.features.shape[1]):
        size = points.features[:, k]
        terms |= {f"{name}·s{k}": terms[name] * size for name in ("1", "1/v", "load", "load/v")}
    if overhead:
        terms |= dict(_overhead(points))
    if level != "plain":
        terms |= dict(_upstream(points))
    if level == "rich":
        terms |= dict(_rich(points))
    return terms


def select(terms: dict[str, Floats], weights: Floats) -> list[str]:
    """Names of the terms that are not zero everywhere and not a multiple of a simpler one on these rows.

    Args:
        terms: Columns by name, simplest first.
        weights: Row weights that the fit will use, shape ``(n_rows,)``.
    """
    kept: list[str] = []
    units = np.empty((len(terms), len(weights)))
    for name, column in terms.items():
        values = column * weights
        norm = float(np.linalg.norm(values))
        if norm <= 0 or not np.isfinite(norm):
            continue
        unit = values / norm
        if len(kept) == 0 or np.abs(units[: len(kept)] - unit).max(axis=1).min() > _DISTINCT:
            units[len(kept)] = unit
            kept.append(name)
    return kept


def _speeds(points: Points) -> list[tuple[str, Floats]]:
    v = points.vcpus
    return [("", np.ones_like(v)), ("/v", 1.0 / v), *((f"/min(v,{c:g})", 1.0 / np.minimum(v, c)) for c in CAPS)]


def _plain(points: Points) -> Iterator[tuple[str, Floats]]:
    speeds, given = _speeds(points), points.items > 0
    for name, speed in speeds:
        yield f"1{name}", speed
    for name, speed in speeds:
        yield f"load{name}", points.load * speed
    for pieces in PIECES:
        cores = np.minimum(points.workers * points.vcpus, pieces)
        yield f"1/min(dv,{pieces})", np.where(given, 0.0, 1.0 / cores)
    for name, speed in speeds[:2]:
        yield f"waves{name}", np.where(given, points.waves * speed, 0.0)
        yield f"n/d{name}", np.where(given, points.share * speed, 0.0)
    yield "n", points.items
    yield "n/b", np.where(given, np.ceil(points.items / points.batch), 0.0)


def _overhead(points: Points) -> Iterator[tuple[str, Floats]]:
    yield "ln d", np.log(points.workers)
    yield "ln d·load", np.log(points.workers) * points.load
    yield "d", points.workers


def _upstream(points: Points) -> Iterator[tuple[str, Floats]]:
    for name, speed in _speeds(points)[:3]:
        yield f"u{name}", points.upstream * speed
    yield "u/d", np.where(points.items > 0, 0.0, points.upstream / points.workers)


def _rich(points: Points) -> Iterator[tuple[str, Floats]]:
    yield "load^1.25/v^1.25", (points.load / points.vcpus) ** 1.25
    yield "load^1.5/v^1.5", (points.load / points.vcpus) ** 1.5
    yield "√load", np.sqrt(points.load)
    for pieces in PIECES[1:4]:
        steps = np.ceil(pieces / (points.workers * points.vcpus) - 1e-9) / pieces
        yield f"⌈{pieces}/dv⌉", np.where(points.items > 0, 0.0, steps)

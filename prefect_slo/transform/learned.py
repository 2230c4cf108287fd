"""What runs show of how data passes: how much there is, by the size of a run's input, and how fast it passes.

Sizes are a polynomial of the input's features, ``size = θ·(1, x, x²)``, fitted by least squares on relative error; the
degree is the one with the least error on runs left out. SONIC predicts them so too, and leaves data on storage until
its predictions have come within 15 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prefect_slo.observation import StageRuns
from prefect_slo.transform.passing import Links

Floats = NDArray[np.float64]
MB = 2.0**20
LEAST_RUNS = 5
"""Runs of which sizes are learned, at least."""

CONVERGED = 0.15
"""Mean relative error on runs left out, up to which sizes count as known."""

KEPT = 100
"""Latest runs that are looked at."""

_BOUND = 20.0  # a bandwidth that differs from what is usual by more than this factor is an accident of few rows
_APART_MB = 1.0  # rows whose bytes differ by less say nothing of a bandwidth


@dataclass(frozen=True)
class Sizes:
    """How much a stage hands on, by the size of a run's input.

    Attributes:
        coefficients: Of the polynomial, by degree and then by feature: ``1, x₁, …, x₁², …``.
        scale: What features are divided by.
        error: Mean relative error on runs left out; infinite before there are any.
        runs: Runs learned from.
    """

    coefficients: tuple[float, ...]
    scale: tuple[float, ...]
    error: float
    runs: int

    @property
    def converged(self) -> bool:
        """Whether predictions are good enough to plan by."""
        return self.runs >= LEAST_RUNS and self.error <= CONVERGED

    def at(self, features: Mapping[str, float] | Floats) -> float:
        """Megabytes that a run of this input hands on."""
        values = np.array(list(features.values()) if isinstance(features, Mapping) else features, dtype=float)
        scaled = values / np.array(self.scale) if self.scale else values[:0]
        terms = _terms(scaled[None, :], (len(self.coefficients) - 1) // max(len(self.scale), 1))
        return max(float((terms @ np.array(self.coefficients))[0]), 0.0)


def learn_sizes(sizes_mb: Floats, features: Floats) -> Sizes:
    """Learn from runs.

    Args:
        sizes_mb: Megabytes by run, oldest first, shape ``(n_runs,)``; all above 0.
        features: Size of their input, shape ``(n_runs, n_features)``; without features sizes are taken as constant.
    """
    sizes_mb, features = sizes_mb[-KEPT:], features[-KEPT:]
    n = len(sizes_mb)
    if not n:
        return Sizes((0.0,), (), float("inf"), 0)
    scale = np.maximum(np.abs(features).max(axis=0, initial=0.0), 1e-12)
    scaled = features / scale
    found: list[tuple[float, int]] = []
    for degree in range(3 if features.shape[1] else 1):
        terms = _terms(scaled, degree)
        if n > terms.shape[1]:
            found.append((_left_out(terms, sizes_mb), degree))
    error, degree = min(found, key=lambda pair: (round(pair[0], 4), pair[1])) if found else (float("inf"), 0)
    coefficients = _fitted(_terms(scaled, degree), sizes_mb)
    used = scale if degree else scale[:0]
    return Sizes(tuple(coefficients.tolist()), tuple(used.tolist()), error, n)


def learn_links(runs: StageRuns, links: Links, way: Literal["inline", "direct", "remote"]) -> Links:
    """Bandwidths as rows show them, where they do: seconds that more bytes took, of the same stage on as many workers.

    What was read, written and waited for beside computing grows with the bytes moved; the slope is the median over
    pairs of rows (Theil and Sen), so that a few slow runs change nothing.

    Args:
        runs: The rows, of one kind of machine.
        links: What is usual, and stays where rows say nothing.
        way: How their bytes have passed, by and large: ``inline`` through the flow's process, as on this machine; else
            by a link of each worker's own, to other workers or to storage.
    """
    slopes: list[float] = []
    moved_mb = (_known(runs["bytes_in"]) + _known(runs["bytes_out"])) / MB
    if way != "inline":
        moved_mb = moved_mb / runs["workers"]
    seconds = _known(runs["read_s"]) + _known(runs["write_s"]) + _known(runs["overhead_s"])
    keys = [tuple(row) for row in zip(*(runs[name].tolist() for name in ("stage", "workers", "hardware")), strict=True)]
    for key in dict.fromkeys(keys):
        rows = np.array([i for i, other in enumerate(keys) if other == key and not runs["cold"][i]][-KEPT:], dtype=int)
        apart = moved_mb[rows][:, None] - moved_mb[rows][None, :]
        longer = seconds[rows][:, None] - seconds[rows][None, :]
        slopes += (longer[apart > _APART_MB] / apart[apart > _APART_MB]).tolist()
    if len(slopes) < LEAST_RUNS or (slope := float(np.median(slopes))) <= 0:
        return links
    if way == "inline":
        speed = _bounded(1 / slope, links.inline_mb_s)
        faster = speed / links.inline_mb_s
        return replace(links, inline_mb_s=speed, machine_mb_s=links.machine_mb_s * faster)
    if way == "direct":
        speed = _bounded(1 / slope, links.direct_mb_s)
        return replace(links, direct_mb_s=speed, inline_mb_s=links.inline_mb_s * speed / links.direct_mb_s)
    speed = _bounded(1 / slope, links.down_mb_s)
    return replace(links, up_mb_s=links.up_mb_s * speed / links.down_mb_s, down_mb_s=speed)


def broadcasts(taken_mb: float, given_mb: tuple[float, ...], calls: int) -> tuple[bool, ...]:
    """Which parents give all they make to each call: those that explain best how much a stage takes.

    Args:
        taken_mb: Megabytes that the stage takes over all its calls.
        given_mb: Megabytes that each parent makes.
        calls: Calls of the stage.
    """
    if calls <= 1:
        return (False,) * len(given_mb)

    def off(chosen: tuple[bool, ...]) -> float:
        explained = sum(size * (calls if all_ else 1) for size, all_ in zip(given_mb, chosen, strict=True))
        return abs(taken_mb - explained)

    return min(product((False, True), repeat=len(given_mb)), key=off)


def _terms(scaled: Floats, degree: int) -> Floats:
    terms: Floats = np.hstack([np.ones((len(scaled), 1)), *(scaled**power for power in range(1, degree + 1))])
    return terms


def _fitted(terms: Floats, sizes_mb: Floats) -> Floats:
    weights = 1 / sizes_mb[:, None]
    found: Floats = np.linalg.lstsq(terms * weights, np.ones(len(sizes_mb)), rcond=None)[0].astype(np.float64)
    return found


def _left_out(terms: Floats, sizes_mb: Floats) -> float:
    """Mean relative error of each run by a fit to the others."""
    errors = []
    for i in range(len(sizes_mb)):
        rest = np.arange(len(sizes_mb)) != i
        predicted = float(terms[i] @ _fitted(terms[rest], sizes_mb[rest]))
        errors.append(abs(predicted - sizes_mb[i]) / sizes_mb[i])
    return float(np.mean(errors))


def _known(column: NDArray[np.float64]) -> Floats:
    known: Floats = np.nan_to_num(column.astype(np.float64), nan=0.0)
    return known


def _bounded(value: float, usual: float) -> float:
    return min(max(value, usual / _BOUND), usual * _BOUND)

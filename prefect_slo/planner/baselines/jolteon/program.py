r"""The continuous program: least mean cost (or time) with every sampled constraint kept, by SLSQP.

    minimise    E cost(x)                             subject to   Σ_{i ∈ path} T_is(x) + driver_s ≤ bound   ∀ path, s
    minimise t  subject to  E length of path(x) ≤ t,  Σ_i C_is(x) ≤ budget   ∀ path, s

(Jolteon, NSDI 2024, §4.2–4.3: one constraint per path instead of the maximum, risk 0 within the samples.) SLSQP finds a
local optimum and needs no convexity; where it finds no feasible point, its last point is what rounding starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from prefect_slo.planner.baselines.jolteon.pruning import support
from prefect_slo.planner.baselines.jolteon.responses import Response
from prefect_slo.planner.problem import Goal, Problem

Floats = NDArray[np.float64]

ROUNDS = 8
"""Solutions that are checked against all samples; each puts back the pruned samples that it breaks."""

ITERATIONS = 200
"""Of SLSQP."""

TOLERANCE = 1e-6
"""Relative, of objective and constraints."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A point of the program.

    Attributes:
        workers: ``(n_stages,)``.
        vcpus: ``(n_stages,)``.
        objective: Mean cost in US dollars, or mean latency in seconds.
        kept: Whether every sampled constraint holds.
        constraints: How many of them SLSQP was given.
    """

    workers: Floats
    vcpus: Floats
    objective: float
    kept: bool
    constraints: int


@dataclass(frozen=True, eq=False)
class Program:
    """The program of a sampled problem.

    Attributes:
        problem: Stages and samples.
        goal: Objective and the one bound.
        times: Response by stage.
        costs: Response by stage.
        low: Least workers, then least vCPUs, by stage, ``(2 · n_stages,)``.
        high: Most of them.
        paths: Stages of every path from a source to a sink.
    """

    problem: Problem
    goal: Goal
    times: Sequence[Response]
    costs: Sequence[Response]
    low: Floats
    high: Floats
    paths: Sequence[tuple[int, ...]] = field(default_factory=tuple)

    def solve(self, *, prune: bool = True) -> Solution:
        """The optimum of all sampled constraints, those that cannot bind left out with ``prune``."""
        groups = self._groups()
        kept = [self._support(g) if prune else np.arange(self.problem.n_samples) for g in groups]
        x = np.sqrt(self.low * self.high)
        for _ in range(ROUNDS):
            x = self._slsqp(x, kept)
            broken = [np.flatnonzero(self._slack(x, g, slice(None))[0] < -10 * TOLERANCE) for g in groups]
            if all(set(b) <= set(k) for b, k in zip(broken, kept, strict=True)):
                break
            kept = [np.union1d(k, b) for k, b in zip(kept, broken, strict=True)]
        n = len(self.times)
        fine = not any(len(b) for b in broken)
        return Solution(x[:n], x[n : 2 * n], self._objective(x)[0], fine, sum(len(k) for k in kept))

    @property
    def _timed(self) -> bool:
        return self.goal.latency_bound_s < inf

    def _groups(self) -> list[tuple[Sequence[Response], tuple[int, ...]]]:
        """What is constrained in every sample: the length of each path, or the cost of all stages."""
        if self._timed:
            return [(self.times, path) for path in self.paths]
        return [(self.costs, tuple(range(len(self.costs))))]

    def _slsqp(self, x: Floats, kept: Sequence[NDArray[np.intp]]) -> Floats:
        groups = self._groups()

        def slacks(point: Floats) -> tuple[Floats, Floats]:
            pairs = [self._slack(point, g, k) for g, k in zip(groups, kept, strict=True)]
            return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])

        low, high, start, scale = self.low, self.high, x, abs(self._objective(x)[0]) or 1.0
        if not self._timed:  # t, the length of the longest path, is one more variable
            low, high = np.append(low, 0.0), np.append(high, inf)
            start = np.append(x, self._objective(x)[0])

        def objective(point: Floats) -> tuple[float, Floats]:
            if self._timed:
                value, slope = self._objective(point)
                return value / scale, slope / scale
            return point[-1] / scale, np.append(np.zeros(len(point) - 1), 1.0 / scale)

        def rest(point: Floats) -> tuple[Floats, Floats]:
            if self._timed:
                return slacks(point)
            value, slope = slacks(point[:-1])
            lengths, slopes = self._mean_lengths(point[:-1])
            above = np.column_stack([-slopes, np.ones(len(lengths))]) / scale
            return (
                np.concatenate([value, (point[-1] - lengths) / scale]),
                np.vstack([np.column_stack([slope, np.zeros(len(value))]), above]),
            )

        found = minimize(
            objective, np.clip(start, low, high), jac=True, method="SLSQP",
            bounds=list(zip(low, high, strict=True)),
            constraints={"type": "ineq", "fun": lambda p: rest(p)[0], "jac": lambda p: rest(p)[1]},
            options={"maxiter": ITERATIONS, "ftol": TOLERANCE},
        )  # fmt: skip
        point = found.x if np.isfinite(found.x).all() else start
        return np.clip(point[: len(self.low)], self.low, self.high)

    def _terms(self, x: Floats, response: Response, i: int) -> tuple[Floats, Floats]:
        """Terms of a stage at a point, ``(n_terms,)``, and their derivatives, ``(n_terms, n_variables)``."""
        n, parents = len(self.times), [p for p, _ in self.problem.stages[i].parents]
        rows = response.terms(x[i], x[n + i], float(sum(x[p] for p in parents)))
        slope = np.zeros((rows.shape[1], 2 * n))
        slope[:, i], slope[:, n + i] = rows[1], rows[2]
        for p in parents:
            slope[:, p] += rows[3]
        return rows[0], slope

    def _slack(
        self, x: Floats, group: tuple[Sequence[Response], tuple[int, ...]], kept: NDArray[np.intp] | slice
    ) -> tuple[Floats, Floats]:
        """Relative room to the bound in some samples and its derivatives."""
        responses, stages = group
        bound = self.goal.latency_bound_s if self._timed else self.goal.cost_bound_usd
        driver = self.problem.driver[kept].astype(float) if self._timed else 0.0
        total: Floats = np.zeros(1)
        slope: Floats = np.zeros((1, 2 * len(self.times)))
        for i in stages:
            terms, slopes = self._terms(x, responses[i], i)
            theta = responses[i].theta[kept]
            total, slope = total + theta @ terms, slope + theta @ slopes
        return 1.0 - (total + driver) / bound, -slope / bound

    def _objective(self, x: Floats) -> tuple[float, Floats]:
        """Mean cost, or mean length of the longest path, with its derivatives."""
        if not self._timed:
            lengths, slopes = self._mean_lengths(x)
            return float(lengths.max()), slopes[int(lengths.argmax())]
        return self._mean(x, self.costs, tuple(range(len(self.costs))))

    def _mean_lengths(self, x: Floats) -> tuple[Floats, Floats]:
        pairs = [self._mean(x, self.times, path) for path in self.paths]
        driver = float(self.problem.driver.mean())
        return np.array([value for value, _ in pairs]) + driver, np.stack([slope for _, slope in pairs])

    def _mean(self, x: Floats, responses: Sequence[Response], stages: tuple[int, ...]) -> tuple[float, Floats]:
        value, slope = 0.0, np.zeros(2 * len(self.times))
        for i in stages:
            terms, slopes = self._terms(x, responses[i], i)
            theta = responses[i].theta.mean(axis=0)
            value, slope = value + float(theta @ terms), slope + theta @ slopes
        return value, slope

    def _support(self, group: tuple[Sequence[Response], tuple[int, ...]]) -> NDArray[np.intp]:
        responses, stages = group
        n, values = len(self.times), []
        for i in stages:
            parents = [p for p, _ in self.problem.stages[i].parents]
            for ends in np.stack([self.low, self.high]):
                for d in (self.low[i], self.high[i]):
                    for v in (self.low[n + i], self.high[n + i]):
                        terms = responses[i].terms(d, v, float(sum(ends[p] for p in parents)))[0]
                        values.append(responses[i].theta @ terms)
        if self._timed:
            values.append(self.problem.driver.astype(float))
        return support(np.unique(np.stack(values, axis=1), axis=1))

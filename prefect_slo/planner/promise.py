r"""Whether a plan keeps its bound under nearly every truth that the rows allow for, not only on their average.

Samples that mix everything the parameters may be give the chance that the *next run* keeps the bound. A promise with
confidence γ says more: P(latency ≤ bound | θ) ≥ percentile for a share γ of the possible truths θ. An optimiser parks
its plans on the bound, so that a plan chosen by the first alone breaks the second about as often as not.
"""

from __future__ import annotations

from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.dominance import Reduced
from prefect_slo.planner.incumbent import begin
from prefect_slo.planner.problem import Choice, Goal, Problem, percentile
from prefect_slo.planner.sampling import RUNS, Sampler

OVERSHOOT = 1.002
"""A bound that some truths break is tightened by this much more than they break it by, so that the next plan passes."""

CLOSE = 0.985
"""A plan that surely keeps more than this share of its bound is close enough to it: bolder ones save very little."""

GUESS = 100
"""Runs under each truth for a first guess of the room; the tests that follow correct it."""

_LAST = 1_000
"""Number of the draws that are no attempt's own."""


def sure_quantile(values: NDArray[np.floating], at: float, confidence: float) -> float:
    """What the percentile of runs stays below under a share ``confidence`` of the truths.

    The percentile under one truth is known from finitely many runs of it, which widens its spread over the truths. The
    log percentiles of the two halves of each truth's runs share nothing but the truth, so that their covariance is the
    spread due to the truths alone; the percentiles are drawn together to it.

    Args:
        values: Times or costs, ``(n_truths, n_runs)``.
        at: Percentile of runs, as a fraction.
        confidence: Share of truths.
    """
    logs, even, odd = (
        np.log(np.maximum(np.quantile(part, at, axis=1), 1e-12)) for part in (values, values[:, ::2], values[:, 1::2])
    )
    total = float(np.var(logs, ddof=1))
    between = float(np.cov(even, odd)[0, 1])
    kept = sqrt(min(max(between, 0.0) / total, 1.0)) if total > 0 else 0.0
    centre = float(logs.mean())
    # Weibull's positions, p·(n + 1): the default's fall short of a high quantile of few truths.
    return float(np.exp(np.quantile(centre + kept * (logs - centre), confidence, method="weibull")))


def sure(
    sampler: Sampler, problem: Problem, choice: Choice, at: float, confidence: float, attempt: int = _LAST,
    *, runs: int = RUNS,
) -> tuple[float, float]:  # fmt: skip
    """Latency in seconds and cost in US dollars that a plan surely keeps; 0 from a model without uncertainty."""
    drawn = sampler.truths(problem, choice, attempt, runs=runs)
    if drawn is None:
        return 0.0, 0.0
    latency, cost = (sure_quantile(values, at, confidence) for values in drawn)
    return latency, cost


def excess(
    sampler: Sampler, problem: Problem, choice: Choice, goal: Goal, confidence: float, attempt: int
) -> tuple[float, float]:
    """What a plan surely keeps over each bound, of latency and of cost: it is promised where neither is above 1."""
    if goal.latency_bound_s == goal.cost_bound_usd == inf:
        return 0.0, 0.0
    latency, cost = sure(sampler, problem, choice, goal.percentile, confidence, attempt)
    return latency / goal.latency_bound_s, cost / goal.cost_bound_usd


def first_room(sampler: Sampler, problem: Problem, goal: Goal, at: float, confidence: float) -> tuple[float, float]:
    """What to divide the bounds by before the first search, judged by a plan that moves alone have found.

    Args:
        sampler: Draws the truths.
        problem: What is searched.
        goal: At the percentile of the search.
        at: Percentile that is promised.
        confidence: Of the promise.
    """
    problem = Reduced.of(problem, goal).problem
    reference = begin(problem, goal).reference
    if reference is None:
        return 1.0, 1.0
    allowed = goal.allowed(problem.n_samples)
    promised = sure(sampler, problem, reference, at, confidence, runs=GUESS)
    expected = (percentile(values, allowed) for values in (problem.latency(reference), problem.cost(reference)))
    latency, cost = (max(p / max(e, 1e-300), 1.0) for p, e in zip(promised, expected, strict=True))
    return latency, cost


def tightened(room: tuple[float, float], over: tuple[float, float]) -> tuple[float, float]:
    """The room of the next search, after one whose plan exceeded its bounds by these factors."""
    latency, cost = (was * (OVERSHOOT * by if by > 1 else 1.0) for was, by in zip(room, over, strict=True))
    return latency, cost


def loosened(room: tuple[float, float], over: tuple[float, float]) -> tuple[float, float]:
    """The room of a bolder search, after one whose plan has this share of its bounds; the same where that is enough."""
    if max(over) > CLOSE or max(over) == 0:
        return room
    latency, cost = (max(was * by, 1.0) if by > 0 else was for was, by in zip(room, over, strict=True))
    return latency, cost

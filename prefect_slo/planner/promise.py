r"""Whether a plan keeps its bound under nearly every truth that the rows allow for, not only on their average.

Samples that mix everything the parameters may be give the chance that the *next run* keeps the bound. A promise with
confidence γ says more: P(latency ≤ bound | θ) ≥ percentile for a share γ of the possible truths θ. An optimiser parks
its plans on the bound, so that a plan chosen by the first alone breaks the second about as often as not.

The search knows nothing of this: it is given bounds with room, and what its plan surely keeps says how much room.
"""

from __future__ import annotations

from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.problem import Choice, Goal, Problem, percentile
from prefect_slo.planner.sampling import Sampler
from prefect_slo.planner.search import Found
from prefect_slo.planner.solver import Solver

ATTEMPTS = 6
"""Searches for a plan that can be promised before there is none."""

OVERSHOOT = 1.002
"""A bound that some truths break is tightened by this much more than they break it by, so that the next plan passes."""

CLOSE = 0.985
"""A plan that surely keeps more than this share of its bound is close enough to it: bolder ones save very little."""

Room = tuple[float, float]
"""What the bounds of latency and cost are divided by."""


def promised(sampler: Sampler, solver: Solver, goal: Goal, at: float, confidence: float) -> list[Found]:
    """Plans that keep the goal under a share ``confidence`` of the truths, the best first.

    After one that is promised with much to spare, a bolder one is tried. From a model that is sure of itself, the plan.

    Args:
        sampler: Draws the truths.
        solver: Of the problem.
        goal: What is asked, at the percentile that is promised.
        at: Percentile of the search.
        confidence: Of the promise.
    """
    room = _first_room(sampler, solver, goal, at, confidence)
    kept: list[Found] = []
    known: list[Choice] = []
    for attempt in range(ATTEMPTS):
        found = solver.solve(goal.at(at).within(*room), known)
        if found.choice is None and attempt == 0:
            found = solver.solve(goal, known)
        if found.choice is None or (kept and found.choice == kept[0].choice):
            break
        over = excess(sampler, solver.problem, found.choice, goal, confidence)
        known = [found.choice]
        if max(over) <= 1:
            if kept and found.score >= kept[0].score:
                break
            kept.insert(0, found)
            if (bolder := loosened(room, over)) == room:
                break
            room = bolder
        elif kept:
            break
        else:
            room = tightened(room, over)
    if kept:
        return kept
    safest = solver.safest(goal)
    if safest.choice is None or max(excess(sampler, solver.problem, safest.choice, goal, confidence)) > 1:
        return []
    return [safest]


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
    half = (values.shape[1] + 1) // 2
    logs, first, second = (
        np.log(np.maximum(_percentiles(part, at), 1e-12)) for part in (values, values[:, :half], values[:, half:])
    )
    total = float(np.var(logs, ddof=1))
    between = float(np.cov(first, second)[0, 1])
    kept = sqrt(min(max(between, 0.0) / total, 1.0)) if total > 0 else 0.0
    centre = float(logs.mean())
    # Weibull's positions, p·(n + 1): the default's fall short of a high quantile of few truths.
    return float(np.exp(np.quantile(centre + kept * (logs - centre), confidence, method="weibull")))


def sure(sampler: Sampler, problem: Problem, choice: Choice, at: float, confidence: float) -> tuple[float, float]:
    """Latency in seconds and cost in US dollars that a plan surely keeps; 0 from a model without uncertainty."""
    drawn = sampler.truths(problem, choice)
    if drawn is None:
        return 0.0, 0.0
    latency, cost = (sure_quantile(values, at, confidence) for values in drawn)
    return latency, cost


def excess(sampler: Sampler, problem: Problem, choice: Choice, goal: Goal, confidence: float) -> tuple[float, float]:
    """What a plan surely keeps over each bound, of latency and of cost: it is promised where neither is above 1."""
    drawn = sampler.truths(problem, choice)
    if drawn is None:
        return 0.0, 0.0
    bounds = goal.latency_bound_s, goal.cost_bound_usd
    latency, cost = (
        sure_quantile(values, goal.percentile, confidence) / bound if bound < inf else 0.0
        for values, bound in zip(drawn, bounds, strict=True)
    )
    return latency, cost


def _first_room(sampler: Sampler, solver: Solver, goal: Goal, at: float, confidence: float) -> Room:
    """Room for the first search, judged by a plan that moves alone have found."""
    if not sampler.uncertain or goal.latency_bound_s == goal.cost_bound_usd == inf:
        return 1.0, 1.0
    problem = solver.problem
    reference = solver.start(goal.at(at)).reference
    if reference is None:
        return 1.0, 1.0
    allowed = goal.at(at).allowed(problem.n_samples)
    over = excess(sampler, problem, reference, goal, confidence)
    bounds = goal.latency_bound_s, goal.cost_bound_usd
    expected = (percentile(values, allowed) for values in (problem.latency(reference), problem.cost(reference)))
    latency, cost = (
        max(by * bound / max(e, 1e-300), 1.0) if bound < inf else 1.0
        for by, bound, e in zip(over, bounds, expected, strict=True)
    )
    return latency, cost


def tightened(room: Room, over: tuple[float, float]) -> Room:
    """The room of the next search, after one whose plan exceeded its bounds by these factors."""
    latency, cost = (was * (OVERSHOOT * by if by > 1 else 1.0) for was, by in zip(room, over, strict=True))
    return latency, cost


def loosened(room: Room, over: tuple[float, float]) -> Room:
    """The room of a bolder search, after one whose plan has this share of its bounds; the same where that is enough."""
    if max(over) > CLOSE or max(over) == 0:
        return room
    latency, cost = (max(was * by, 1.0) if by > 0 else was for was, by in zip(room, over, strict=True))
    return latency, cost


def _percentiles(values: NDArray[np.floating], at: float) -> NDArray[np.floating]:
    """The percentile of each row, between the two values next to it."""
    position = at * (values.shape[1] - 1)
    low = int(position)
    high = min(low + 1, values.shape[1] - 1)
    ordered = np.partition(values, (low, high), axis=1)
    return np.asarray(ordered[:, low] + (position - low) * (ordered[:, high] - ordered[:, low]))

r"""Whether a plan keeps its bound under nearly every truth that the rows allow for, not only on their average.

Samples that mix everything the parameters may be give the chance that the *next run* keeps the bound. A promise with
confidence γ says more: P(latency ≤ bound | θ) ≥ percentile for a share γ of the possible truths θ. An optimiser parks
its plans on the bound, so that a plan chosen by the first alone breaks the second about as often as not.

The search knows nothing of this: it is given bounds with room, and what its plan surely keeps says how much room.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
"""Room is made by this much more than the plan before needed, so that the next one passes."""

CLOSE = 0.985
"""A plan that surely keeps more than this share of its bound is close enough to it: bolder ones save very little."""

WORTH = 0.002
"""What a bolder plan must save to be worth another test."""

Room = tuple[float, float]
"""What the bounds of latency and cost are divided by."""


def promised(
    sampler: Sampler, solver: Solver, goal: Goal, at: float, confidence: float, least: Room = (1.0, 1.0)
) -> list[Found]:
    """Plans that keep the goal under a share ``confidence`` of the truths, the best first.

    Moves find plans for bounds with more and more or less room; the room of the best that can be promised is then
    searched. From a model that is sure of itself, the plan of the search.

    Args:
        sampler: Draws the truths.
        solver: Of the problem.
        goal: What is asked, at the percentile that is promised.
        at: Percentile of the search.
        confidence: Of the promise.
        least: Room that is known to be needed.
    """
    test = Promise(sampler, solver.problem, goal, at, confidence)
    kept, room = _moved(test, solver, least) if test.open else (None, least)
    found = Found(None, inf, -inf, 0, False)
    if kept is not None or not test.open:
        found = solver.solve(goal.at(at).within(*room), () if kept is None else (kept,))
    if found.choice is None:
        others = (solver.solve(goal.within(*least)), solver.safest(goal))
        return [other for other in others if test.keeps(other)]
    plans = [found]
    if kept is not None and found.choice != kept:
        moved = replace(found, choice=kept, score=solver.problem.score(kept, goal), complete=False)
        plans = [found, moved] if test.keeps(found) else [moved]
    thrifty = solver.thrifty(goal.at(at).within(*room), plans[0])
    return [thrifty, *plans] if thrifty.choice != plans[0].choice and test.keeps(thrifty) else plans


def _moved(test: Promise, solver: Solver, least: Room) -> tuple[Choice | None, Room]:
    """The best plan that moves find and that can be promised, and the room that it was found with.

    A plan is looked for with as much room as the one before it needed: what that surely keeps, over what it keeps in
    the search. One that broke its promise needs more than it was given, so that it is not found again; one that has
    much to spare needs less, and a bolder one is tried.
    """
    goal, problem = test.goal, solver.problem
    start = solver.start(goal.at(test.at))
    room = least if start.reference is None else raised(least, test.judge(start.reference).room)
    best: tuple[float, Choice, Room] | None = None
    for _ in range(ATTEMPTS):
        asked = goal.at(test.at).within(*room)
        start = solver.start(asked, () if start.plan is None else (start.plan,))
        choice = start.plan or solver.solve(asked).choice
        if choice is None or (best and problem.score(choice, goal) >= best[0] * (1 - WORTH)):
            break
        verdict = test.judge(choice)
        if verdict.kept:
            best = problem.score(choice, goal), choice, room
            following = raised(least, verdict.room)
        else:
            least = raised(least, verdict.wider)
            following = least if best else raised(least, room)
        if verdict.close or (best and not narrower(following, best[2])):
            break
        room = following
    return (None, room) if best is None else best[1:]


@dataclass(frozen=True)
class Verdict:
    """What a plan surely keeps.

    Attributes:
        over: Its latency and cost over the bounds on them; 0 where there is none.
        room: The same over what the search sees of them, at least 1.
    """

    over: Room
    room: Room

    @property
    def kept(self) -> bool:
        """Whether the promise holds."""
        return max(self.over) <= 1

    @property
    def close(self) -> bool:
        """Whether it holds with nothing to spare, or is none."""
        return CLOSE < max(self.over) <= 1 or max(self.over) == 0

    @property
    def wider(self) -> Room:
        """Room for the next plan, where this one broke a bound."""
        latency, cost = (room * OVERSHOOT if over > 1 else 1.0 for room, over in zip(self.room, self.over, strict=True))
        return latency, cost


@dataclass(frozen=True, eq=False)
class Promise:
    """The test of plans.

    Attributes:
        sampler: Draws the truths.
        problem: What the search sees.
        goal: What is asked, at the percentile that is promised.
        at: Percentile of the search.
        confidence: Share of the truths.
    """

    sampler: Sampler
    problem: Problem
    goal: Goal
    at: float
    confidence: float

    @property
    def bounds(self) -> tuple[float, float]:
        """Of latency and cost."""
        return self.goal.latency_bound_s, self.goal.cost_bound_usd

    @property
    def open(self) -> bool:
        """Whether there is anything to promise that the model is not sure of."""
        return self.sampler.uncertain and min(self.bounds) < inf

    def keeps(self, found: Found) -> bool:
        """Whether there is a plan, and the promise holds for it."""
        return found.choice is not None and self.judge(found.choice).kept

    def judge(self, choice: Choice) -> Verdict:
        """What a plan surely keeps."""
        drawn = self.sampler.truths(self.problem, choice) if self.open else None
        if drawn is None:
            return Verdict((0.0, 0.0), (1.0, 1.0))
        allowed = self.goal.at(self.at).allowed(self.problem.n_samples)
        over, room = [], []
        seen = self.problem.latency, self.problem.cost
        for values, bound, samples in zip(drawn, self.bounds, seen, strict=True):
            safe = sure_quantile(values, self.goal.percentile, self.confidence) if bound < inf else 0.0
            expected = percentile(samples(choice), allowed) if bound < inf else 1.0
            over.append(safe / bound)
            room.append(max(safe / max(expected, 1e-300), 1.0))
        return Verdict((over[0], over[1]), (room[0], room[1]))


def needed(problem: Problem, goal: Goal, at: float, choice: Choice, drawn: Room) -> Room:
    """Room without which a plan that failed its test is found again: what it takes over what the search sees of it.

    Args:
        problem: What the search sees.
        goal: What is asked.
        at: Percentile of the next search.
        choice: The plan.
        drawn: What latency and cost must stay below for it to pass.
    """
    allowed, room = goal.at(at).allowed(problem.n_samples), []
    bounds, seen = (goal.latency_bound_s, goal.cost_bound_usd), (problem.latency, problem.cost)
    for passing, bound, samples in zip(drawn, bounds, seen, strict=True):
        expected = max(percentile(samples(choice), allowed), 1e-300) if passing > bound else inf
        room.append(max(passing, bound) / expected * OVERSHOOT if expected <= bound else 1.0)
    return room[0], room[1]


def raised(room: Room, least: Room) -> Room:
    """The larger room, bound by bound."""
    return max(room[0], least[0]), max(room[1], least[1])


def narrower(room: Room, than: Room) -> bool:
    """Whether some bound has less room."""
    return any(own < other for own, other in zip(room, than, strict=True))


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
    half = values.shape[1] // 2
    halves = values[:, : 2 * half].reshape(-1, half)
    logs = np.log(np.maximum(_percentiles(values, at), 1e-12))
    first, second = np.log(np.maximum(_percentiles(halves, at), 1e-12)).reshape(-1, 2).T
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


def _percentiles(values: NDArray[np.floating], at: float) -> NDArray[np.floating]:
    """The percentile of each row, between the two values next to it."""
    position = at * (values.shape[1] - 1)
    low = int(position)
    high = min(low + 1, values.shape[1] - 1)
    ordered = np.partition(values, (low, high), axis=1)
    return np.asarray(ordered[:, low] + (position - low) * (ordered[:, high] - ordered[:, low]))

"""Good plans fast: a sweep over prices of a second, then moves of one stage at a time.

At a price *p* every stage takes the option of least ``mean cost + p · φ_i · latency``, where φ_i is how often the
stage lies on the longest path of the plan before. Sweeping *p* walks the cost/latency trade-off from the cheapest plan
to the fastest, so the same sweep starts the search for every goal and seeds the Pareto front.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.multipliers import Network
from prefect_slo.planner.problem import Choice, Goal, Problem, percentile

Floats = NDArray[np.floating]

PRICES = 25
"""Prices in a sweep; each costs one evaluation of a plan."""


def sweep(problem: Problem, typical: Sequence[Floats] | None = None, prices: int = PRICES) -> list[Choice]:
    """Plans from cheapest to fastest, duplicates removed; those that break structural limits are left out.

    Args:
        problem: What is planned.
        typical: Latency that stands for each option, ``(n_upstream, n_options)`` by stage; the mean by default.
        prices: How many prices to try between free and priceless seconds.
    """
    typical = typical or [stage.latency.mean(axis=2) for stage in problem.stages]
    network = Network.of(problem.stages)
    dollars = sum(
        float(np.ptp(stage.mean_cost[:, mask])) for stage, mask in zip(problem.stages, problem.allowed, strict=True)
    )
    seconds = sum(float(np.ptp(t[:, mask])) for t, mask in zip(typical, problem.allowed, strict=True))
    rate = max(dollars, 1e-12) / max(seconds, 1e-12)
    shares = np.ones(len(problem.stages))
    found: dict[Choice, None] = {}
    for price in (0.0, *(rate * np.geomspace(1e-3, 1e3, prices)), inf):
        for _ in range(2):
            choice = _at_price(problem, typical, shares, price)
            if choice is None:
                break
            shares = np.maximum(_on_path(problem, network, typical, choice), 0.02)
        if choice is not None and problem.admits(choice):
            found[choice] = None
    return list(found)


def incumbent(problem: Problem, goal: Goal) -> tuple[Choice | None, Choice | None]:
    """The best plan that a sweep and single moves reach, and the one nearest to keeping the bounds.

    Returns:
        ``(plan, reference)``: ``plan`` is ``None`` when none was found that keeps the bounds; ``reference`` is the
        plan, or else the fastest of the sweep (the cheapest where only cost is bounded), ``None`` when nothing fits.
    """
    candidates = sweep(problem)
    if not candidates:
        return None, None
    for _ in range(2):
        scores = [problem.score(choice, goal) for choice in candidates]
        best = candidates[int(np.argmin(scores))] if min(scores) < inf else None
        middle = best or _nearest(problem, goal, candidates)
        slow = np.argsort(problem.latency(middle), kind="stable")[-max(1, problem.n_samples // 10) :]
        candidates += sweep(problem, [stage.latency[:, :, slow].mean(axis=2) for stage in problem.stages])
    scores = [problem.score(choice, goal) for choice in candidates]
    at = int(np.argmin(scores))
    if scores[at] == inf:
        return None, _nearest(problem, goal, candidates)
    best = polish(problem, goal, candidates[at], scores[at])
    return best, best


def polish(problem: Problem, goal: Goal, choice: Choice, score: float, sweeps: int = 4) -> Choice:
    """Change one stage at a time as long as that improves the score."""
    for _ in range(sweeps):
        before = choice
        for i in range(len(problem.stages)):
            for option in np.flatnonzero(problem.allowed[i]):
                trial = (*choice[:i], int(option), *choice[i + 1 :])
                if option == choice[i] or goal.cost_weight * problem.mean_cost(trial) >= score:
                    continue
                value = problem.score(trial, goal)
                if value < score:
                    choice, score = trial, value
        if choice == before:
            break
    return choice


def _nearest(problem: Problem, goal: Goal, candidates: Sequence[Choice]) -> Choice:
    allowed = goal.allowed(problem.n_samples)
    if goal.latency_bound_s < inf:
        return min(candidates, key=lambda choice: percentile(problem.latency(choice), allowed))
    return min(candidates, key=problem.mean_cost)


def _at_price(problem: Problem, typical: Sequence[Floats], shares: Floats, price: float) -> Choice | None:
    choice: list[int] = []
    for i, stage in enumerate(problem.stages):
        row = problem.upstream_row(i, choice)
        options = np.flatnonzero(problem.open_options(i, choice))
        if not options.size:
            return None
        time, cost = typical[i][row, options], stage.mean_cost[row, options]
        value = time + 1e-9 * cost if price == inf else cost + price * shares[i] * time
        choice.append(int(options[value.argmin()]))
    return tuple(choice)


def _on_path(problem: Problem, network: Network, typical: Sequence[Floats], choice: Choice) -> Floats:
    """How often each stage lies on the longest path, over a thousand samples at most."""
    some = slice(None, 1000)
    latency, piece = [], []
    for i, stage in enumerate(problem.stages):
        latency.append(stage.latency[problem.upstream_row(i, choice), choice[i], some])
        piece.append(latency[-1] * stage.piece[choice[i]])
    _, on = network.longest(latency, piece)
    return np.array([on[[*into["full"], *into["piece"]]].any(axis=0).mean() for into in network.into])

r"""The quantile bound of two chance constraints, latencies and costs taken from scenarios of their own.

A plan may break its bound on latency in *k* scenarios and that on cost in *k* others, so a bound that reads both from
one scenario has to excuse 2·*k*. Take every pair (s, r) instead, latencies from s and costs from r. One of any *k* + 1
scenarios s keeps the latency, and for each s one of any *k* + 1 scenarios r keeps the cost, so the (*k* + 1)-th largest
over s of the (*k* + 1)-th largest over r bounds every plan:

    score ≥ Q_s Q_r  max_{λ,ν} Σ_i min_o (α·E[C_io] + μ_i·L_ios + ν·C_ior) + …

Some 40,000 pairs at 4,000 samples: too many for every node of a search, few enough for the gap that it reports.
"""

from __future__ import annotations

from math import inf

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.multipliers import ascend
from prefect_slo.planner.problem import Choice, Goal, Problem
from prefect_slo.planner.suffix import Suffix

Floats = NDArray[np.floating]

SLOW, DEAR = 1.15, 1.02
"""Scenarios of latency and of cost, as multiples of how many may be violated; one more than that is the least. Where
branches run side by side, the slowest under one plan are not quite the slowest under another, which takes some more."""

PAIRS = 3_000
"""Pairs at once, which then stay in the cache."""


def paired_bound(problem: Problem, goal: Goal, reference: Choice) -> float:
    """No plan on the menu scores less than this.

    Args:
        problem: Stages and samples.
        goal: With a bound on cost, and latency bounded or in the objective.
        reference: A good plan: decides how tight the bound is, never whether it holds.
    """
    n, allowed = problem.n_samples, goal.allowed(problem.n_samples)
    late, size = (min(n, int(factor * allowed) + 2) for factor in (SLOW, DEAR))
    if min(late, size) <= allowed:
        return -inf
    slow = np.argsort(problem.latency(reference), kind="stable")[n - late :]
    dear = np.argsort(problem.cost(reference), kind="stable")[n - size :]
    rows = [problem.upstream_row(i, reference) for i in range(len(problem.stages))]
    rank = size - 1 - allowed
    columns = problem.columns(slow, np.full(late, dear[rank]))
    prices = ascend(columns, goal, rows)
    times = [prices.price(i, stage.piece) * stage.latency for i, stage in enumerate(columns.stages)]
    for time, stage in zip(times, problem.stages, strict=True):
        time += (goal.cost_weight * stage.mean_cost).astype(np.float32)[:, :, None]
    costs = [stage.cost.take(dear, axis=2) for stage in problem.stages]
    constant, best = prices.constant(columns, goal), np.empty(late)
    step = max(1, PAIRS // size)
    for at in range(0, late, step):
        some = slice(at, at + step)
        price = prices.cost_price[some]
        suffix = Suffix.of(problem, lambda i, some=some, price=price: _pairs(times[i][:, :, some], costs[i], price))  # type: ignore[misc]
        values = constant[some, None] + suffix.rest(0, ()).reshape(len(price), size)
        best[some] = np.partition(values, rank, axis=1)[:, rank]
    return float(np.partition(best, late - 1 - allowed)[late - 1 - allowed])


def _pairs(times: Floats, costs: Floats, price: Floats) -> Floats:
    """Time of every scenario s plus the priced cost of every scenario r, ``(n_upstream, n_options, n_s · n_r)``."""
    both = price[:, None] * costs[:, :, None, :]
    both += times[:, :, :, None]
    return np.asarray(both.reshape(*costs.shape[:2], -1))

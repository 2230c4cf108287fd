"""The cost/latency front: the cheapest plan for each of a row of latency bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from prefect_slo.plan import StagePlan
from prefect_slo.planner.certify import SEARCH_SHARE
from prefect_slo.planner.dominance import Reduced
from prefect_slo.planner.incumbent import SAMPLES, begin, begin_from
from prefect_slo.planner.make import stage_plans
from prefect_slo.planner.problem import Choice, Goal, Problem, percentile
from prefect_slo.planner.sampling import Sampler, TableSource
from prefect_slo.planner.search import search
from prefect_slo.planner.sweep import sweep
from prefect_slo.units import fraction, whole

NODES = 30
"""Nodes per point: neighbours start from each other's plans, so little is left to search."""


SEEDS = 12
"""Plans of the sweeps that a point starts from: the cheapest of those that seem fast enough."""


@dataclass(frozen=True)
class ParetoPoint:
    """One plan of the front, under the model and uncertified.

    Attributes:
        latency_s: Latency at the percentile.
        cost_usd: Mean cost.
        lower_bound_usd: No plan as fast is cheaper than this, for the sampled problem.
        stages: Stage plans by name.
    """

    latency_s: float
    cost_usd: float
    lower_bound_usd: float
    stages: Mapping[str, StagePlan]


def pareto(
    model: TableSource,
    *,
    points: int = 20,
    percentile: float = 0.95,
    seed: int = 0,
    cold: bool | float = False,
    pins: Mapping[str, Mapping[str, object]] | None = None,
    samples: int = 4000,
    node_limit: int = NODES,
) -> tuple[ParetoPoint, ...]:
    """The front from the fastest plan to the cheapest; no point is slower and dearer than another.

    Args:
        model: Draws samples per menu option.
        points: Bounds that are tried, evenly spaced in log latency; fewer plans come back where they coincide.
        percentile: Percentile of latency.
        seed: Seed of every draw.
        cold: Plan for workers that all start cold.
        pins: Choices that are fixed, by stage.
        samples: Samples of the search.
        node_limit: Nodes per point.
    """
    risk = SEARCH_SHARE * (1 - fraction(percentile, "percentile"))
    sampler = Sampler(model, seed, cold, pins or {}, samples)
    return front(sampler.problem(), 1 - risk, whole(points, "points"), node_limit)


def front(problem: Problem, at: float, points: int, node_limit: int = NODES) -> tuple[ParetoPoint, ...]:
    """The front of a sampled problem at a percentile; see ``pareto``."""
    free = Goal(percentile=at)
    reduced = Reduced.of(problem, free)
    problem, allowed = reduced.problem, free.allowed(problem.n_samples)

    def slowness(choice: Choice) -> float:
        return percentile(problem.latency(choice), allowed)

    ends = []
    for goal in (free.fastest(), free):
        first = begin(problem, goal)
        ends.append(search(problem, goal, incumbent=first.plan, reference=first.reference, node_limit=node_limit))
    if ends[0].choice is None or ends[1].choice is None:
        return ()
    low, high = slowness(ends[0].choice), slowness(ends[1].choice)
    found: dict[Choice, float] = {ends[1].choice: ends[1].lower_bound}
    seeds = [*sweep(problem), *sweep(problem, ends[0].choice), *sweep(problem, ends[1].choice), ends[0].choice]
    seeds = list(dict.fromkeys(seeds))
    some = problem.sample(SAMPLES)
    times = np.array([percentile(some.latency(seed), free.allowed(some.n_samples)) for seed in seeds])
    previous = ends[1].choice
    for bound in np.geomspace(low, max(high, low), points)[::-1]:
        if slowness(previous) <= bound and found.get(previous, -inf) > -inf and previous in found:
            continue
        goal = replace(free, latency_bound_s=float(bound))
        near = [seeds[at] for at in np.flatnonzero(times <= 1.03 * bound)]
        first = begin_from(problem, goal, [previous, *sorted(near, key=problem.mean_cost)[:SEEDS]])
        result = search(problem, goal, incumbent=first.plan, reference=first.reference, node_limit=node_limit)
        if result.choice is None:
            continue
        previous = result.choice
        found[previous] = max(found.get(previous, -inf), result.lower_bound)
    ranked = sorted(((slowness(c), problem.mean_cost(c), bound, c) for c, bound in found.items()), key=lambda r: r[:2])
    kept: list[ParetoPoint] = []
    for time, cost, bound, choice in ranked:
        if not kept or cost < kept[-1].cost_usd:
            kept.append(ParetoPoint(time, cost, min(bound, cost), stage_plans(problem, choice)))
    return tuple(kept)

"""AWS Lambda Power Tuning: each function by itself, on mean time and mean cost at every size.

``cost`` takes the cheapest size (the faster of equals), ``speed`` the fastest, ``balanced`` the least of
w · cost/largest cost + (1 − w) · time/largest time (w = 0.5). It knows neither tails nor graphs nor objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prefect_slo.errors import InfeasibleSlo, InvalidValue
from prefect_slo.objective import Objective, Slo
from prefect_slo.plan import Plan
from prefect_slo.planner.baselines.grid import nearest_workers, sizes_at
from prefect_slo.planner.make import uncertified
from prefect_slo.planner.sampling import Sampler, TableSource

Floats = NDArray[np.float64]
Strategy = Literal["cost", "speed", "balanced"]

TRIM = 0.2
"""Share of the runs that is left out at either end of a mean."""


def power_tuning(
    model: TableSource,
    objective: Objective,
    *,
    seed: int = 0,
    samples: int = 2000,
    strategy: Strategy = "balanced",
    weight: float = 0.5,
    workers: int | None = None,
) -> Plan:
    """Every stage at its own best size, whatever the objective.

    Args:
        model: Draws samples per menu option.
        objective: Recorded in the plan; plays no part in the choice.
        seed: Of the samples.
        samples: How many.
        strategy: What a size is chosen for.
        weight: Of cost, where balanced.
        workers: Workers of every stage (the nearest count on its menu); the middle of each menu by default.

    Raises:
        InfeasibleSlo: The plan breaks the workflow's constraints or capacity.
        InvalidValue: No such strategy, or a weight outside [0, 1].
    """
    sampler = Sampler(model, seed, samples=samples)
    problem = sampler.problem()
    choice: list[int] = []
    for i, (stage, mask) in enumerate(zip(problem.stages, problem.allowed, strict=True)):
        middle = int(stage.classes[len(stage.classes) // 2])
        options = sizes_at(stage, mask, nearest_workers(stage, mask, workers or middle))
        row = problem.upstream_row(i, choice)
        times = [trimmed_mean(stage.latency[row, o].astype(float)) for o in options]
        costs = [trimmed_mean(stage.cost[row, o].astype(float)) for o in options]
        choice.append(options[tune(times, costs, strategy, weight)])
    if not problem.admits(choice):
        raise InfeasibleSlo("a plan", None, problem.stages[-1].name, 0.0)
    return uncertified(sampler, problem, choice, Slo.of(objective))


def tune(times: Sequence[float], costs: Sequence[float], strategy: Strategy, weight: float = 0.5) -> int:
    """Position of the size that a strategy takes, given mean times and costs.

    >>> tune([35.0, 10.0, 8.0], [1.0, 1.0, 2.0], "cost"), tune([35.0, 10.0, 8.0], [1.0, 1.0, 2.0], "speed")
    (1, 2)
    """
    if strategy not in ("cost", "speed", "balanced"):
        raise InvalidValue("strategy", strategy, "'cost', 'speed' or 'balanced'")
    if not 0 <= weight <= 1:
        raise InvalidValue("weight", weight, "a number in [0, 1]: 0 is fastest, 1 is cheapest")
    time, cost = np.asarray(times, dtype=float), np.asarray(costs, dtype=float)
    if strategy == "cost":
        return int(np.lexsort((time, cost))[0])
    if strategy == "speed":
        return int(np.lexsort((cost, time))[0])
    return int(np.argmin(weight * cost / cost.max() + (1 - weight) * time / time.max()))


def trimmed_mean(values: Floats, trim: float = TRIM) -> float:
    """Mean without the smallest and the largest share of the values."""
    cut = int(trim * len(values))
    return float(np.sort(values)[cut : len(values) - cut].mean())

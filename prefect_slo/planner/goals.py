"""From what a user promises to what is asked of the sampled problem."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from prefect_slo.errors import InvalidValue
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.planner.problem import Goal
from prefect_slo.units import finite, positive


@dataclass(frozen=True)
class Balanced:
    """A weighted balance of cost and latency, with or without bounds.

    Minimises ``weight · mean cost / cost_scale_usd + (1 − weight) · percentile latency / latency_scale_s``, the
    "balanced" strategy of AWS Lambda Power Tuning lifted from one function to a workflow.

    Args:
        weight: Weight of cost, from 0 (fastest) to 1 (cheapest).
        within: Bounds that hold besides.
        cost_scale_usd: Cost that counts as 1; the cheapest plan's mean by default.
        latency_scale_s: Latency that counts as 1; the fastest plan's percentile by default.
        percentile: Percentile of latency that counts, where no bound names one.

    Raises:
        InvalidValue: A weight outside [0, 1] or a scale that is not positive.
    """

    weight: float = 0.5
    within: Slo | None = None
    cost_scale_usd: float | None = None
    latency_scale_s: float | None = None
    percentile: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= finite(self.weight, "weight") <= 1:
            raise InvalidValue("weight", self.weight, "a number in [0, 1]: 0 is fastest, 1 is cheapest")
        for name in ("cost_scale_usd", "latency_scale_s"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), name)

    def goal(self, cost_scale_usd: float, latency_scale_s: float) -> Goal:
        """The goal, with scales for those that were left open."""
        bounds = goal_of(self.within) if self.within else Goal(percentile=self.percentile)
        return Goal(
            percentile=bounds.percentile,
            latency_bound_s=bounds.latency_bound_s,
            cost_bound_usd=bounds.cost_bound_usd,
            cost_weight=self.weight / (self.cost_scale_usd or cost_scale_usd),
            latency_weight=(1 - self.weight) / (self.latency_scale_s or latency_scale_s),
        )


PlanObjective = Latency | Budget | Slo | Balanced


def goal_of(objective: Latency | Budget | Slo) -> Goal:
    """Least mean cost under a latency bound (and a budget), or least latency under a budget alone."""
    slo = Slo.of(objective)
    latency = slo.latency.bound_s if slo.latency else inf
    budget = slo.budget.bound_usd if slo.budget else inf
    weights = (1.0, 0.0) if slo.latency else (0.0, 1.0)
    return Goal(slo.percentile, latency, budget, *weights)

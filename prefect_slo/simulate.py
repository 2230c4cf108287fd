"""What if: many runs of a plan under a model, vectorised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefect_slo.attainment import Attainment
from prefect_slo.errors import InvalidPlan, UnknownStage
from prefect_slo.objective import Budget, Latency, Objective, Slo
from prefect_slo.plan import Plan
from prefect_slo.planner.sampling import TableSource
from prefect_slo.resources import Option
from prefect_slo.units import fraction, whole

Samples = NDArray[np.floating]

SIMULATED = (7, 1)
"""Tag of the draws after the seed; the planner has tags of its own. Numpy pads with zeros, so that a tag must not end
in one: ``[seed, 2]`` and ``[seed, 2, 0]`` are one stream."""


@dataclass(frozen=True, eq=False)
class Simulation:
    """Simulated runs of a plan; run *s* is the same run in every array.

    Attributes:
        latency_s: Latency of each run, ``(runs,)``.
        cost_usd: Cost of each run, ``(runs,)``.
        stage_latency_s: Latency by stage, ``(runs,)`` each, 0 where a branch was not taken.
        stage_cost_usd: Cost by stage, ``(runs,)`` each.
    """

    latency_s: Samples
    cost_usd: Samples
    stage_latency_s: Mapping[str, Samples]
    stage_cost_usd: Mapping[str, Samples]

    def __len__(self) -> int:
        return len(self.latency_s)

    def attainment(self, bound: Objective | float) -> Attainment:
        """How many runs keep a bound, with ``.interval()`` by Clopper and Pearson.

        Args:
            bound: Seconds of latency, or an objective (both of its bounds at once); its percentile plays no part here.
        """
        slo = Slo.of(Latency(bound) if isinstance(bound, (int, float)) else bound)
        kept = np.ones(len(self), dtype=bool)
        if isinstance(slo.latency, Latency):
            kept &= self.latency_s <= slo.latency.bound_s
        if isinstance(slo.budget, Budget):
            kept &= self.cost_usd <= slo.budget.bound_usd
        return Attainment(int(kept.sum()), len(self))

    def latency_quantile(self, q: float) -> float:
        """Quantile of latency in seconds, ``q`` in (0, 1)."""
        return float(np.quantile(self.latency_s, fraction(q, "q")))

    def cost_quantile(self, q: float) -> float:
        """Quantile of cost in US dollars, ``q`` in (0, 1)."""
        return float(np.quantile(self.cost_usd, fraction(q, "q")))


def simulate(
    model: TableSource,
    plan: Plan | Mapping[str, Option],
    runs: int = 1000,
    seed: int = 0,
    *,
    cold: bool | float = False,
) -> Simulation:
    """Runs of a plan under a model; its options may lie off the menu.

    Args:
        model: Draws the times and costs.
        plan: A plan, or options by stage.
        runs: How many.
        seed: Of every draw; the same seed gives the same runs.
        cold: Whether workers start cold, or the share of runs in which they do.

    Raises:
        InvalidPlan: The plan lacks a stage of the workflow.
        UnknownStage: The plan has a stage that the workflow lacks.
    """
    options = {name: p.option for name, p in plan.stages.items()} if isinstance(plan, Plan) else dict(plan)
    known = tuple(stage.name for stage in model.workflow.stages)
    for name in options:
        if name not in known:
            raise UnknownStage(name, known)
    if missing := [name for name in known if name not in options]:
        raise InvalidPlan("plan.stages", sorted(options), f"a stage plan for {', '.join(missing)} too")
    rng = np.random.default_rng(np.random.SeedSequence([seed, *SIMULATED]))
    drawn = model.sample_plan(plan if isinstance(plan, Plan) else options, whole(runs, "runs"), rng, cold=cold)
    return Simulation(
        np.asarray(drawn.latency_s), np.asarray(drawn.cost_usd), drawn.stage_latency_s, drawn.stage_cost_usd
    )

"""Real regret: plans made from some epochs, judged by an epoch that nobody saw.

The oracle knows the judging epoch. It takes the cheapest (fastest) measured plan whose latency (cost) there lies as far
under the bound as ours does by its own prediction: below ``bound ÷ (P95 / mean of our plan)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import inf, nan

import numpy as np
from planning.profiles import Measured, Profile

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.objective import Budget, Latency
from prefect_slo.plan import Plan
from prefect_slo.planner import make_plan
from prefect_slo.planner.problem import Goal

LOOSE = 1.4
"""Latency bounds from so many times the fastest measured plan on count for the extra cost."""


@dataclass(frozen=True)
class Judged:
    """One bound, what was planned for it and what was measured of the plan.

    Attributes:
        workflow: Its name.
        bound: A latency bound in seconds or a budget in US dollars.
        plan: Ours; ``None`` where it was called infeasible.
        latency_s: As measured in the judging epoch.
        cost_usd: As measured there.
        extra: Relative extra objective over the oracle's; ``nan`` where the oracle has no plan or ours is missing.
        loose: Whether the extra counts.
    """

    workflow: str
    bound: Latency | Budget
    plan: Plan | None
    latency_s: float
    cost_usd: float
    extra: float
    loose: bool

    @property
    def missed(self) -> bool:
        """Whether the measured plan broke its bound."""
        if self.plan is None:
            return False
        timed = isinstance(self.bound, Latency)
        return self.latency_s > self.bound.bound_s if timed else self.cost_usd > self.bound.bound_usd

    def __str__(self) -> str:
        judged = (
            f"{self.latency_s:8.2f} s ${self.cost_usd:.5f}  extra {self.extra:+7.2%}" if self.plan else " infeasible"
        )
        marks = f"{'  MISSED' if self.missed else ''}{'' if self.loose else '  (tight)'}"
        return f"{self.workflow:16}{self.bound!s:28}{judged}{marks}"


def judge(profile: Profile, seed: int = 0) -> list[Judged]:
    """Plan and judge every bound of a workflow."""
    source = profile.fitted()
    rows = [_judged(profile, source, Latency(float(bound)), seed) for bound in profile.latency_bounds]
    return rows + [_judged(profile, source, Budget(float(bound)), seed) for bound in profile.cost_bounds]


def _judged(profile: Profile, source: Measured, bound: Latency | Budget, seed: int) -> Judged:
    timed = isinstance(bound, Latency)
    loose = not timed or bound.bound_s >= LOOSE * profile.fastest_s
    try:
        plan = make_plan(source, bound, seed=seed)
    except InfeasibleSlo:
        return Judged(profile.name, bound, None, nan, nan, nan, loose)
    latency, cost = profile.replay(plan.stages)
    predicted = plan.predicted
    assert predicted is not None
    if timed:
        room = bound.bound_s / (predicted.latency_s.p95 / predicted.latency_s.mean)
        best, own = profile.oracle(Goal(latency_bound_s=room)), cost
    else:
        room = bound.bound_usd / (predicted.cost_usd.p95 / predicted.cost_usd.mean)
        best, own = profile.oracle(Goal(cost_bound_usd=room, cost_weight=0.0, latency_weight=1.0)), latency
    return Judged(profile.name, bound, plan, latency, cost, own / best - 1 if best < inf else nan, loose)


def falls(rows: list[Judged], workflow: str) -> bool:
    """Whether predicted mean cost never rises with the latency bound, nor P95 latency with the budget."""
    timed = [r.plan.predicted for r in rows if r.workflow == workflow and isinstance(r.bound, Latency) and r.plan]
    spent = [r.plan.predicted for r in rows if r.workflow == workflow and isinstance(r.bound, Budget) and r.plan]
    costs = [p.cost_usd.mean for p in timed if p]
    times = [p.latency_at_percentile_s for p in spent if p]
    return all(b <= a * 1.002 for values in (costs, times) for a, b in pairwise(values))


def flat(profile: Profile, seed: int = 0) -> bool:
    """Whether the objective stays where it is once the bound doesn't bind: at 10 and at 100 times the widest bound."""
    source = profile.fitted()
    slow, dear = float(max(profile.latency_bounds)), float(max(profile.cost_bounds))
    timed = [make_plan(source, Latency(factor * slow), seed=seed).predicted for factor in (10, 100)]
    spent = [make_plan(source, Budget(factor * dear), seed=seed).predicted for factor in (10, 100)]
    costs = [p.cost_usd.mean for p in timed if p]
    times = [p.latency_at_percentile_s for p in spent if p]
    return all(max(values) <= min(values) * 1.002 for values in (costs, times))


def summary(rows: list[Judged]) -> dict[str, float]:
    """Figures of the bars: median and worst extra cost over the loose latency bounds, misses over all bounds."""
    timed = [row for row in rows if isinstance(row.bound, Latency)]
    extra = np.array([row.extra for row in timed if row.loose])
    spent = np.array([row.extra for row in rows if row not in timed])
    return {
        "extra cost, median": float(np.nanmedian(extra)),
        "extra cost, worst": float(np.nanmax(extra)),
        "extra latency, median": float(np.nanmedian(spent)),
        "extra latency, worst": float(np.nanmax(spent)),
        "misses": float(sum(row.missed for row in rows)),
        "bounds": float(len(rows)),
    }

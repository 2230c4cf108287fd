"""Every planner on every bound of a measured workflow: what its plans cost and take, as a table and a plot.

Planners with a model of their own get it (``kind``); all plans are judged alike: by one simulator (our model of every
epoch) and by the epoch that no model has seen.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
from planning.plots import Line, panels
from planning.profiles import Measured, Profile

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Budget, Latency
from prefect_slo.plan import Plan
from prefect_slo.planner import make_plan
from prefect_slo.planner.baselines import (
    all_max,
    all_min,
    caerus,
    ditto_cost,
    ditto_latency,
    jolteon,
    orion,
    power_tuning,
    uniform,
)  # fmt: skip
from prefect_slo.planner.goals import goal_of

OURS = "prefect_slo"

PLANNERS: dict[str, tuple[str, Callable[..., Plan]]] = {
    OURS: ("white-box", make_plan),
    "jolteon": ("regression", jolteon),
    "jolteon, our model": ("white-box", jolteon),
    "orion": ("empirical", orion),
    "ditto-l": ("analytic", ditto_latency),
    "ditto-c": ("analytic", ditto_cost),
    "caerus": ("analytic", caerus),
    "power tuning": ("white-box", power_tuning),
    "uniform": ("white-box", uniform),
    "all-min": ("white-box", all_min),
    "all-max": ("white-box", all_max),
}

SAMPLES = 20_000


@dataclass(frozen=True)
class Point:
    """A planner's plan for a bound.

    Attributes:
        workflow: Its name.
        kind: ``latency`` or ``budget``.
        bound: Seconds or US dollars.
        planner: Its name.
        p95_s: Latency by the simulator.
        cost_usd: Mean cost by the simulator.
        p95_usd: P95 of cost by the simulator.
        measured_s: Latency in the judging epoch.
        measured_usd: Cost in the judging epoch.
        plan_s: CPU seconds that planning took, the model being fitted.
    """

    workflow: str
    kind: str
    bound: float
    planner: str
    p95_s: float
    cost_usd: float
    p95_usd: float
    measured_s: float
    measured_usd: float
    plan_s: float

    @property
    def keeps(self) -> bool:
        """Whether its P95 keeps the bound by the simulator."""
        return (self.p95_s if self.kind == "latency" else self.p95_usd) <= self.bound

    @property
    def kept(self) -> bool:
        """Whether its measured run kept the bound."""
        return (self.measured_s if self.kind == "latency" else self.measured_usd) <= self.bound


def points(profile: Profile, seed: int = 0) -> list[Point]:
    """Plans of every planner for every bound; a planner that finds none has no point there."""
    sources = {kind: profile.fitted(kind) for kind in dict.fromkeys(kind for kind, _ in PLANNERS.values())}
    simulator = WorkflowModel(profile.workflow).fit(profile.table)
    found = []
    for bound in [*map(Latency, profile.latency_bounds), *map(Budget, profile.cost_bounds)]:
        for name, (kind, planner) in PLANNERS.items():
            point = _point(profile, simulator, sources[kind], name, planner, bound, seed)
            found += [point] if point else []
    return found


def dominating(found: Sequence[Point], margin: float = 0.005) -> list[tuple[Point, Point]]:
    """Pairs (other, ours) where the other keeps a bound by the simulator and is no dearer and no slower than ours.

    One of the two must be better by more than a margin; that ours is slower but cheaper, or dearer but faster, is a
    choice.
    """
    ours = {(p.workflow, p.kind, p.bound): p for p in found if p.planner == OURS}
    pairs = [(p, ours[p.workflow, p.kind, p.bound]) for p in found if (p.workflow, p.kind, p.bound) in ours]
    return [
        (other, own)
        for other, own in pairs
        if other.planner != OURS
        and other.keeps
        and other.p95_s <= own.p95_s
        and other.cost_usd <= own.cost_usd
        and (other.p95_s < own.p95_s * (1 - margin) or other.cost_usd < own.cost_usd * (1 - margin))
    ]


def against(found: Sequence[Point], planner: str) -> dict[str, float]:
    """Our measured cost over another planner's at the latency bounds that it keeps, bounds it breaks, planning time."""
    timed = [p for p in found if p.kind == "latency"]
    ours = {(p.workflow, p.bound): p for p in timed if p.planner == OURS}
    other = [p for p in timed if p.planner == planner]
    both = [(ours[p.workflow, p.bound], p) for p in other if p.kept and (p.workflow, p.bound) in ours]
    shared = [(ours[p.workflow, p.bound], p) for p in other if (p.workflow, p.bound) in ours]
    ratios = [own.measured_usd / p.measured_usd for own, p in both]
    return {
        "cost ratio, median": float(np.median(ratios)) if ratios else nan,
        "cost ratio, least": min(ratios, default=nan),
        "cost ratio, most": max(ratios, default=nan),
        "bounds kept": float(sum(p.kept for p in other)),
        "bounds broken": float(sum(not p.kept for p in other)),
        "bounds broken by P95": float(sum(not p.keeps for p in other)),
        "ours broken": float(sum(not p.kept for p in ours.values())),
        "time ratio, median": float(np.median([own.plan_s / p.plan_s for own, p in shared])),
    }


def floor_ratios(profile: Profile, found: Sequence[Point], planner: str) -> list[float]:
    """The oracle's cost over a planner's at each bound that it keeps: what nobody could get below."""
    kept = [p for p in found if p.kind == "latency" and p.planner == planner and p.kept and p.workflow == profile.name]
    return [profile.oracle(goal_of(Latency(p.bound))) / p.measured_usd for p in kept]


def last_seven_per_cent(profile: Profile) -> float:
    """Cost of the fastest plan over that of one that may take 7 % longer, by our model and without a promise."""
    source = profile.fitted()
    fastest = make_plan(source, Budget(1e6))
    assert fastest.predicted is not None
    relaxed = make_plan(source, Latency(1.07 * fastest.predicted.latency_s.p95, confidence=0.5))
    assert relaxed.predicted is not None
    return fastest.predicted.cost_usd.mean / relaxed.predicted.cost_usd.mean


def write(found: Sequence[Point], folder: Path) -> None:
    """A table (CSV) and a plot (SVG) per workflow."""
    folder.mkdir(parents=True, exist_ok=True)
    for workflow in dict.fromkeys(p.workflow for p in found):
        mine = [p for p in found if p.workflow == workflow]
        with (folder / f"{workflow}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(mine[0])))
            writer.writeheader()
            writer.writerows(asdict(p) for p in mine)
        (folder / f"{workflow}.svg").write_text(panels(workflow, _panels(mine)))


def _panels(mine: Sequence[Point]) -> list[tuple[str, str, list[Line]]]:
    """Measured latency and cost over the latency bounds, then over the budgets."""
    titles = {"latency": "latency bound (s)", "budget": "budget (US$)"}
    values = {"measured_s": "measured latency (s)", "p95_s": "P95 (s)", "measured_usd": "measured cost (US$)"}
    return [
        (titles[kind], label, [_line(mine, kind, name, planner) for planner in PLANNERS])
        for kind in titles
        for name, label in values.items()
    ]


def _line(mine: Sequence[Point], kind: str, value: str, planner: str) -> Line:
    chosen = [p for p in mine if p.kind == kind and p.planner == planner]
    return Line(planner, [p.bound for p in chosen], [getattr(p, value) for p in chosen], planner == OURS)


def _point(
    profile: Profile, simulator: WorkflowModel, source: Measured, name: str, planner: Callable[..., Plan],
    bound: Latency | Budget, seed: int,
) -> Point | None:  # fmt: skip
    begin = time.process_time()
    try:
        plan: Any = planner(source, bound, seed=seed)
    except InfeasibleSlo:
        return None
    seconds = time.process_time() - begin
    drawn = simulator.sample_plan(plan, SAMPLES, np.random.default_rng([seed, 7]))
    measured = profile.replay(plan.stages)
    kind = "latency" if isinstance(bound, Latency) else "budget"
    value = bound.bound_s if isinstance(bound, Latency) else bound.bound_usd
    assert measured[0] < inf
    return Point(
        profile.name, kind, float(value), name, float(np.quantile(drawn.latency_s, 0.95)),
        float(drawn.cost_usd.mean()), float(np.quantile(drawn.cost_usd, 0.95)), *measured, seconds,
    )  # fmt: skip

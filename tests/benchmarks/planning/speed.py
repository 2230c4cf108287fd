"""How fast and how close to the optimum the search is; times are CPU seconds, table drawing left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan
from typing import Any

import numpy as np
from planning.instances import AT, VCPUS, WORKERS, Instance, instances
from planning.profiles import Profile

from prefect_slo.objective import Budget, Latency
from prefect_slo.planner import make_plan
from prefect_slo.planner.pareto import front
from prefect_slo.planner.problem import Goal
from prefect_slo.planner.solver import solve

MENU = {"workers": WORKERS, "vcpus": VCPUS}
LARGE = {"workers": (1, 2, 3, 4, 6, 8, 16, 32), "vcpus": (0.5, 1, 1.5, 2, 3, 4, 5, 6), "coupled": 0.0}

QUICK_NODES, PROOF_NODES = 100, 40_000
PROOF_S = 5.0


@dataclass
class Search:
    """Figures of one kind of instance; one entry each.

    Attributes:
        name: Kind.
        seconds: Of the quick plan.
        regret: Its score over the best known (a longer search from the same samples).
        gap: As the quick plan reports it.
        proof_s: Of the longer search; infinite where it ended without a proof.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    regret: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    proof_s: list[float] = field(default_factory=list)

    @property
    def proven(self) -> float:
        """Share of instances proven optimal within five seconds."""
        return float(np.mean([seconds <= PROOF_S for seconds in self.proof_s])) if self.proof_s else nan

    def __str__(self) -> str:
        regret = f"  regret {np.median(self.regret):7.3%} (max {max(self.regret):6.2%})" if self.regret else ""
        proven = f"  proven {self.proven:4.0%}" if self.proof_s else ""
        return (
            f"{self.name:34s} n={len(self.seconds):2d}  cpu {np.median(self.seconds):5.2f} s"
            f" (max {max(self.seconds):5.2f}){regret}"
            f"  gap {np.median(self.gap):6.2%} (max {max(self.gap):6.2%}){proven}"
        )


def searched(
    name: str, shape: str, n: int, count: int, goal: Callable[[Instance], Goal], *, proof: int = PROOF_NODES,
    samples: int = 4048, **menu: Any,
) -> Search:  # fmt: skip
    """Plan every instance quickly, then search it for up to five seconds (``proof`` nodes)."""
    found = Search(name)
    for instance in instances(shape, n, count, samples, **menu):
        asked = goal(instance)
        begin = time.process_time()
        quick = solve(instance.problem, asked, QUICK_NODES)
        found.seconds.append(time.process_time() - begin)
        found.gap.append(quick.gap)
        assert quick.choice is not None
        if proof:
            begin = time.process_time()
            longer = solve(instance.problem, asked, proof, quick.choice)
            found.proof_s.append(time.process_time() - begin if longer.complete else np.inf)
            found.regret.append(quick.score / longer.score - 1)
    return found


def anytime(count: int) -> list[Search]:
    """Eight stages of 54 options, both kinds of bound, and the graphs of Azure's population."""
    rows = [searched(f"latency, {s}", s, 8, count, _timed, **MENU) for s in ("chain", "diamonds", "sources", "random")]
    rows.append(searched("latency, options' own noise", "chain", 8, count, _timed, own_noise=0.03, **MENU))
    rows.append(searched("latency, azure", "azure", 0, 3 * count, _timed, proof=PROOF_NODES // 4, **MENU))
    return rows + [searched(f"budget, {s}", s, 8, count, _budgeted, proof=3000, **MENU) for s in ("chain", "diamonds")]


def large(count: int) -> list[Search]:
    """Fifty stages of 64 options."""
    return [
        searched(f"50 x 64, {s}", s, 50, count, _timed, proof=0, samples=4000, **LARGE) for s in ("chain", "diamonds")
    ]


def front_seconds(points: int = 20) -> float:
    """CPU seconds of a front at eight stages of 54 options."""
    problem = next(instances("diamonds", 8, 1, 4000, **MENU)).problem
    begin = time.process_time()
    front(problem, AT, points)
    return time.process_time() - begin


def by_samples(
    profile: Profile, counts: tuple[int, ...] = (10, 100, 1000, 4000, 10_000)
) -> dict[int, tuple[float, float]]:
    """CPU seconds of ``make_plan``, certificate included, for a latency bound and a budget, by number of samples."""
    source = profile.fitted()
    goals = (Latency(2.0 * profile.fastest_s), Budget(1.5 * profile.cheapest_usd))
    found = {}
    for count in counts:
        seconds = []
        for goal in goals:
            begin = time.process_time()
            make_plan(source, goal, samples=count)
            seconds.append(time.process_time() - begin)
        found[count] = (seconds[0], seconds[1])
    return found


def _timed(instance: Instance) -> Goal:
    return instance.timed


def _budgeted(instance: Instance) -> Goal:
    return instance.budgeted

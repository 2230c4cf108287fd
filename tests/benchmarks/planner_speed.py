"""How good, how sure and how fast the planner is, in one table: ``python tests/benchmarks/planner_speed.py [--quick]``.

Instances are random (graphs, stage formulas, bounds); times are CPU seconds of this process, table drawing left out.
*regret* is the cost above the best plan known (a search of some seconds from the same samples), *gap* is what the
planner itself reports, *proven* how often a search of at most five seconds ends with a proof.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from prefect_slo.planner.make import solve
from prefect_slo.planner.pareto import front
from prefect_slo.planner.problem import Goal, Problem, percentile
from prefect_slo.planner.search import search
from prefect_slo.planner.sweep import sweep

WORKERS, VCPUS = (1, 2, 4, 8, 16, 32), (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6)
"""54 options a stage."""

AT = 0.955
"""Percentile of the search: 0.9 of the risk of a P95 objective."""


@dataclass(frozen=True)
class Row:
    """Figures of one kind of instance."""

    name: str
    seconds: list[float]
    regret: list[float]
    gap: list[float]
    proven: list[bool]

    def __str__(self) -> str:
        return (
            f"{self.name:30s} n={len(self.seconds):2d}"
            f"  cpu {np.median(self.seconds):5.2f} s (max {max(self.seconds):5.2f})"
            f"  regret {np.median(self.regret):7.3%} (max {max(self.regret):6.2%})"
            f"  gap {np.median(self.gap):6.2%} (max {max(self.gap):6.2%})  proven {np.mean(self.proven):4.0%}"
        )


def models() -> ModuleType:
    """The synthetic models of the planner's tests."""
    path = Path(__file__).parents[1] / "planner" / "conftest.py"
    spec = importlib.util.spec_from_file_location("synthetic_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def instances(shape: str, n: int, count: int, samples: int, **kwargs: Any) -> Iterator[tuple[Problem, float, float]]:
    """Problems with a latency bound of 1.1 to 3 times the fastest, and the budget of a plan that keeps it."""
    make = models().synthetic
    for seed in range(count):
        rng = np.random.default_rng(seed)
        model = make(shape, n, seed=seed, noise=float(rng.uniform(0.03, 0.15)), **kwargs)
        problem = Problem.of(model.tables(samples, rng))
        allowed = Goal(AT).allowed(samples)
        plans = [(percentile(problem.latency(plan), allowed), plan) for plan in sweep(problem)]
        bound = min(plans)[0] * rng.uniform(1.1, 3.0)
        keeping = min((plan for latency, plan in plans if latency <= bound), key=problem.mean_cost)
        yield problem, float(bound), percentile(problem.cost(keeping), allowed)


def measure(
    name: str, shape: str, n: int, count: int, goal: Callable[[float, float], Goal], nodes: int = 100,
    proof: int = 25_000, samples: int = 4048, **kwargs: Any,
) -> Row:  # fmt: skip
    """Plan every instance quickly, then search it for up to five seconds."""
    row = Row(name, [], [], [], [])
    for problem, bound, budget in instances(shape, n, count, samples, **kwargs):
        asked = goal(bound, budget)
        begin = time.process_time()
        found = solve(problem, asked, nodes)
        row.seconds.append(time.process_time() - begin)
        assert found.choice is not None
        begin = time.process_time()
        longer = search(problem, asked, incumbent=found.choice, node_limit=proof)
        row.proven.append(longer.complete and time.process_time() - begin <= 5.0)
        row.regret.append(found.score / longer.score - 1)
        row.gap.append(found.gap)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two instances of each kind")
    count = 2 if parser.parse_args().quick else 10
    menu = {"workers": WORKERS, "vcpus": VCPUS}

    def latency(bound: float, budget: float) -> Goal:
        return Goal(AT, latency_bound_s=bound)

    def budget(bound: float, budget: float) -> Goal:
        return Goal(AT, cost_bound_usd=budget, cost_weight=0.0, latency_weight=1.0)

    print("8 stages x 54 options x 4,048 samples")
    for shape in ("chain", "diamonds", "sources", "random"):
        print(measure(f"latency bound, {shape}", shape, 8, count, latency, **menu), flush=True)
    for shape in ("chain", "diamonds"):
        print(measure(f"budget, {shape}", shape, 8, count, budget, proof=2000, **menu), flush=True)
    own = measure("chain, options' own noise 3 %", "chain", 8, count, latency, proof=4000, own_noise=0.03, **menu)
    print(own, flush=True)
    print("4 stages x 24 options x 4,000 samples")
    small = {"workers": (4, 8, 16, 32), "vcpus": (1, 2, 3, 3.5, 4, 5)}
    print(measure("latency bound, chain", "chain", 4, count, latency, samples=4000, **small), flush=True)
    print("50 stages x 64 options x 4,000 samples")
    large = {"workers": (1, 2, 3, 4, 6, 8, 16, 32), "vcpus": (0.5, 1, 1.5, 2, 3, 4, 5, 6), "coupled": 0.0}
    for shape in ("chain", "diamonds"):
        row = measure(f"latency bound, {shape}", shape, 50, min(count, 3), latency, proof=300, samples=4000, **large)
        print(row, flush=True)
    for problem, _, _ in instances("diamonds", 8, 1, 4000, **menu):
        begin = time.process_time()
        points = front(problem, AT, 20)
        print(f"Pareto front of {len(points)} points, 8 stages: {time.process_time() - begin:.2f} s CPU")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()

"""Random problems: graphs, stage formulas and bounds all drawn, with the models of the planner's tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from prefect_slo.planner.problem import Goal, Problem, percentile
from prefect_slo.planner.sweep import sweep

WORKERS, VCPUS = (1, 2, 4, 8, 16, 32), (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6)
"""54 options a stage."""

AT = 0.955
"""Percentile of the search: 0.9 of the risk of a P95 objective."""

Parents = list[list[tuple[int, str]]]

WIDTH = ((1, 0.787), (2, 0.921), (8, 0.976), (32, 1.0))
DEPTH = ((1, 0.125), (2, 0.680), (3, 0.868), (5, 0.960), (8, 1.0))
"""Width and depth of the workflows of Azure Durable Functions (two weeks of October 2021), as cumulative shares."""


@dataclass(frozen=True, eq=False)
class Instance:
    """A problem with a latency bound of 1.1 to 3 times the fastest, and the budget of a plan that keeps it."""

    problem: Problem
    latency_s: float
    cost_usd: float

    @property
    def timed(self) -> Goal:
        return Goal(AT, latency_bound_s=self.latency_s)

    @property
    def budgeted(self) -> Goal:
        return Goal(AT, cost_bound_usd=self.cost_usd, cost_weight=0.0, latency_weight=1.0)


@cache
def module(name: str) -> ModuleType:
    """A module of the planner's tests, by file name."""
    path = Path(__file__).parents[2] / "planner" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"planner_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def instances(shape: str, n: int, count: int, samples: int, **kwargs: Any) -> Iterator[Instance]:
    """Problems of one shape (``azure`` draws its own size), reproducible by position."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        graph = azure(rng) if shape == "azure" else shape
        size = len(graph) if shape == "azure" else n
        model = module("conftest").synthetic(graph, size, seed=seed, noise=float(rng.uniform(0.03, 0.15)), **kwargs)
        problem = Problem.of(model.tables(samples, rng))
        allowed = Goal(AT).allowed(samples)
        plans = [(percentile(problem.latency(plan), allowed), plan) for plan in sweep(problem)]
        bound = min(plans)[0] * rng.uniform(1.1, 3.0)
        keeping = min((plan for latency, plan in plans if latency <= bound), key=problem.mean_cost)
        yield Instance(problem, float(bound), percentile(problem.cost(keeping), allowed))


def azure(rng: np.random.Generator) -> Parents:
    """A layered graph with the width and depth of a workflow of Azure Durable Functions.

    One layer has the full width, the others up to it; every stage reads one or two of the layer before.
    """
    depth, width = _drawn(DEPTH, rng), _drawn(WIDTH, rng)
    widths = rng.integers(1, width + 1, depth)
    widths[rng.integers(depth)] = width
    parents: Parents = []
    before: list[int] = []
    for size in widths:
        layer = list(range(len(parents), len(parents) + int(size)))
        for _ in layer:
            count = min(len(before), int(rng.integers(1, 3)))
            parents.append([(int(p), "all") for p in rng.choice(before, count, replace=False)] if before else [])
        before = layer
    return parents


def _drawn(steps: tuple[tuple[int, float], ...], rng: np.random.Generator) -> int:
    """A whole number by its cumulative shares, evenly between the steps."""
    at, low = rng.random(), 0
    for high, share in steps:
        if at <= share:
            return int(rng.integers(low + 1, high + 1))
        low = high
    return steps[-1][0]

"""Jolteon (Zhang, Jin and Jin, NSDI 2024) over sampled tables.

Times and costs of the stages are formulas in continuous workers and vCPUs with random coefficients; a bound must hold
in *every* one of n samples, where Hoeffding's inequality gives n (§4.2); the program is solved by SLSQP, rounded up to
the menu and probed (§4.3). What the released code does besides (one stream of random numbers for all stages, omitted
constants, a bound that is relaxed without a word) is left out. Like the original it returns a plan even when it finds
none that keeps the bound: the plan's own prediction tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import log

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from prefect_slo.errors import InvalidPlan, InvalidValue
from prefect_slo.objective import Objective, Slo
from prefect_slo.plan import Plan
from prefect_slo.planner.baselines.grid import comparable
from prefect_slo.planner.baselines.jolteon.program import Program
from prefect_slo.planner.baselines.jolteon.responses import fit_response
from prefect_slo.planner.baselines.jolteon.rounding import DEPTH, probe, round_up
from prefect_slo.planner.certify import hoeffding_samples
from prefect_slo.planner.goals import goal_of
from prefect_slo.planner.make import uncertified
from prefect_slo.planner.problem import Goal, Problem
from prefect_slo.planner.sampling import Sampler, TableSource
from prefect_slo.workflow import Workflow

PATHS = 64
"""Most paths: each has a constraint per sample. 25 diamonds in a row have 2²⁵ of them."""


def jolteon(
    model: TableSource,
    objective: Objective,
    *,
    seed: int = 0,
    samples: int | None = None,
    published_count: bool = False,
    prune: bool = True,
    excuse: bool = False,
    depth: int = DEPTH,
) -> Plan:
    """The published planner's plan.

    Args:
        model: Draws samples per menu option.
        objective: A latency bound or a budget.
        seed: Of the samples.
        samples: How many; ``jolteon_samples`` by default.
        published_count: Take the set of plans to be as large as the released code does.
        prune: Leave out samples that cannot bind; changes the time, never the optimum.
        excuse: Probe for the percentile within the samples, as the released code does, instead of for every sample.
            Cheaper, but Hoeffding's inequality then promises nothing.
        depth: Steps of probing.

    Raises:
        InvalidPlan: The workflow has more than 64 paths.
        InvalidValue: Both a latency bound and a budget, which the method does not know.
    """
    slo = Slo.of(objective)
    if slo.latency and slo.budget:
        raise InvalidValue("objective", str(slo), "a latency bound or a budget: this planner keeps one bound")
    count = samples or jolteon_samples(model.workflow, slo, published=published_count)
    sampler, goal = Sampler(model, seed, samples=count), goal_of(objective)
    problem = sampler.problem()
    grids = [comparable(stage, mask) for stage, mask in zip(problem.stages, problem.allowed, strict=True)]
    solution = build(problem, goal, grids).solve(prune=prune)
    rounded = round_up(problem, grids, solution.workers, solution.vcpus)
    asked = goal if excuse else goal.at(1.0)
    return uncertified(sampler, problem, probe(problem, asked, grids, rounded, depth), slo)


def jolteon_samples(workflow: Workflow, slo: Slo, *, published: bool = False) -> int:
    """Samples by Hoeffding's inequality over the finite set of plans, with no violation excused.

    ``⌈ln(|D| / δ) / (2 ε²)⌉`` with \\|D\\| the product of the stages' option counts (§4.2). The released code takes the
    square root of it: its exponent is the number of stages halved, though the argument already is their number.
    """
    plans = sum(log(len(stage.menu.options())) for stage in workflow.stages)
    return hoeffding_samples(1 - slo.percentile, 1 - slo.confidence, plans / 2 if published else plans)


def build(problem: Problem, goal: Goal, grids: list[NDArray[np.intp]]) -> Program:
    """The continuous program over the options in ``grids``."""
    times, costs, low, high = [], [], [], []
    for stage, grid in zip(problem.stages, grids, strict=True):
        times.append(fit_response(stage, grid, stage.latency, priced=False))
        costs.append(fit_response(stage, grid, stage.cost, priced=True))
        sizes = np.array([(stage.workers[o], stage.options[o].size.vcpus) for o in grid], dtype=float)
        low.append(sizes.min(axis=0))
        high.append(sizes.max(axis=0))
    return Program(
        problem, goal, times, costs, np.stack(low).T.ravel(), np.stack(high).T.ravel(), tuple(_paths(problem))
    )


def _paths(problem: Problem) -> Iterator[tuple[int, ...]]:
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(problem.stages)))
    graph.add_edges_from((p, i) for i, stage in enumerate(problem.stages) for p, _ in stage.parents)
    sources = [i for i in graph if not graph.in_degree(i)]
    sinks = [i for i in graph if not graph.out_degree(i)]
    lone = [(i,) for i in sources if i in sinks]
    pairs = (path for a in sources for b in sinks if a != b for path in nx.all_simple_paths(graph, a, b))
    found = [*lone, *(tuple(path) for path in islice(pairs, PATHS + 1))]
    if len(found) > PATHS:
        raise InvalidPlan("workflow", f"more than {PATHS} paths", f"at most {PATHS}: each has a constraint per sample")
    return iter(found)

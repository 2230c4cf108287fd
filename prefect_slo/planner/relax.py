r"""Lower bounds on every plan: a linear program for one scenario, and the quantile bound over all.

*One scenario.* Convex combinations of a stage's options, with the longest path as linear constraints, solved by HiGHS.
It is tighter than any convex formula of the stage times, because the formula's epigraph contains the options' hull, and
its duals say what a second or a dollar is worth.

*All scenarios* (quantile bound; Luedtke and Ahmed, SIAM J. Optim. 19(2), 2008, section 4). A plan may break its bound
in at most *k* scenarios, so it keeps it in at least one of any *k* + 1, and the (*k* + 1)-th largest of the single
scenarios' bounds holds for every plan. Each single bound here is a Lagrangian one (``multipliers``), so it is valid
whatever the multipliers, and a branch-and-bound node can use it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from prefect_slo.planner.multipliers import Multipliers, ascend
from prefect_slo.planner.problem import Choice, Goal, Problem
from prefect_slo.planner.suffix import Suffix

Floats = NDArray[np.floating]

CRITICAL = 3.0
"""Scenarios that a bound looks at, as a multiple of how many may be violated."""


CRITICAL_BRANCH = 1.3
"""The same for the longest path through each stage of a graph with branches."""


@dataclass(frozen=True, eq=False)
class Relaxation:
    """Solution of the linear program of one scenario.

    Attributes:
        value: Its objective; infinite when even mixed options cannot keep the bounds.
        mix: Weight of each option, by stage.
        price_of_second: How much the objective falls per second that the latency bound is raised.
        price_of_dollar: The same per US dollar of the cost bound.
    """

    value: float
    mix: tuple[Floats, ...]
    price_of_second: float
    price_of_dollar: float


def relax(
    problem: Problem, goal: Goal, scenario: int | NDArray[np.intp], rows: Sequence[int] | None = None
) -> Relaxation:
    """Mix the menu's options at best for one scenario.

    Args:
        problem: Stages and samples.
        goal: Objective and bounds; the percentile plays no part in a single scenario.
        scenario: Index of a sample, or of several that are averaged into one (then a guide, no bound).
        rows: By stage, the row of its table; by default the least over all rows, which keeps the bound valid.
    """
    at = np.atleast_1d(scenario)
    program = _Program()
    mix = [program.variables(len(stage.options)) for stage in problem.stages]
    starts, ends = program.variables(len(mix)), program.variables(len(mix))
    finish = int(program.variables(1)[0])
    spent: list[tuple[NDArray[np.intp], Floats]] = []
    for i, stage in enumerate(problem.stages):
        row = None if rows is None else rows[i]
        latency, cost = _typical(stage.latency, at, row), _typical(stage.cost, at, row)
        mean = stage.mean_cost.min(axis=0) if row is None else stage.mean_cost[row]
        program.objective(mix[i], goal.cost_weight * mean)
        program.equal(mix[i], np.ones(len(mix[i])), 1.0)
        program.close(mix[i][~problem.allowed[i]])
        spent.append((mix[i], cost))
        program.after(ends[i], starts[i], mix[i], latency)
        program.after(finish, ends[i])
        for p, kind in stage.parents:
            if kind == "all":
                program.after(starts[i], ends[p])
                continue
            parent = problem.stages[p]
            first = _typical(parent.latency, at, None if rows is None else rows[p]) * parent.piece
            program.after(starts[i], starts[p], mix[p], first)
            program.after(ends[i], ends[p], mix[i], latency * stage.piece)
    driver = float(problem.driver[at].mean())
    program.objective(np.array([finish]), np.array([goal.latency_weight]))
    program.at_most(np.array([finish]), np.ones(1), goal.latency_bound_s - driver)
    program.at_most(
        np.concatenate([x for x, _ in spent]), np.concatenate([c for _, c in spent]), goal.cost_bound_usd
    )  # fmt: skip
    solution, duals = program.solve()
    if solution is None:
        return Relaxation(inf, tuple(np.zeros(len(x)) for x in mix), inf, inf)
    value = float(program.costs() @ solution) + goal.latency_weight * driver
    return Relaxation(value, tuple(solution[x] for x in mix), -float(duals[-2]), -float(duals[-1]))


@dataclass(frozen=True, eq=False)
class ScenarioBounds:
    """Lagrangian bounds of the scenarios that decide.

    Attributes:
        problem: The critical scenarios, as columns.
        multipliers: Per scenario.
        constant: ``(n_columns,)``, what a bound holds beside the stages' contributions.
        suffix: Least contributions of open stages.
        excused: How many scenarios may lie above a plan's score.
    """

    problem: Problem
    multipliers: Multipliers
    constant: Floats
    suffix: Suffix
    excused: int

    @classmethod
    def of(cls, problem: Problem, goal: Goal, reference: Choice | None) -> ScenarioBounds:
        """Bounds of the scenarios that are slowest (and dearest) under a reference plan."""
        allowed = goal.allowed(problem.n_samples)
        rows = [0 if reference is None else problem.upstream_row(i, reference) for i in range(len(problem.stages))]
        index = critical_scenarios(problem, goal, reference)
        critical = problem.columns(index, index if goal.cost_bound_usd < inf else None)
        multipliers = ascend(critical, goal, rows)
        suffix = Suffix.of(critical, lambda i: multipliers.stage(critical, goal, i))
        # a plan may break each of two bounds in as many scenarios
        two = goal.cost_bound_usd < inf and (goal.latency_bound_s < inf or goal.latency_weight > 0)
        return cls(critical, multipliers, multipliers.constant(critical, goal), suffix, allowed * (1 + two))

    def root(self) -> Floats:
        """Bound of each scenario with everything open, ``(n_columns,)``."""
        return np.asarray(self.constant + self.suffix.rest(0, ()))

    def quantile(self, values: Floats) -> Floats:
        """The (excused + 1)-th largest of each row, ``(n_rows,)``: a lower bound for every plan."""
        rank = values.shape[1] - 1 - self.excused
        if rank < 0:
            return np.full(len(values), -inf)
        return np.asarray(np.partition(values, rank, axis=1)[:, rank], dtype=np.float64)


def quantile_bound(problem: Problem, goal: Goal, reference: Choice | None = None) -> float:
    """No plan on the menu scores less than this.

    Args:
        problem: Stages and samples.
        goal: Objective and bounds.
        reference: A good plan: decides how tight the bound is, never whether it holds.
    """
    bounds = ScenarioBounds.of(problem, goal, reference)
    return float(bounds.quantile(bounds.root()[None])[0])


def critical_scenarios(problem: Problem, goal: Goal, reference: Choice | None) -> NDArray[np.intp]:
    """Scenarios that decide: the slowest (and dearest) under the reference plan, in their own order.

    On a graph with branches, those in which the longest path through some stage is slow belong to them too.
    """
    n = problem.n_samples
    size = min(n, int(CRITICAL * goal.allowed(n)) + 64)
    if reference is None or size == n:
        return np.arange(n)
    slow = problem.latency(reference)
    if goal.cost_bound_usd < inf:
        size = min(n, 2 * size)
        dear = problem.cost(reference)
        rank = np.maximum(slow.argsort().argsort(), dear.argsort().argsort())
        return np.sort(np.argsort(rank, kind="stable")[n - size :])
    chosen = np.zeros(n, dtype=bool)
    chosen[np.argpartition(slow, n - size)[n - size :]] = True
    if any(len(stage.parents) > 1 for stage in problem.stages) or sum(not s.parents for s in problem.stages) > 1:
        some = min(n, int(CRITICAL_BRANCH * goal.allowed(n)) + 16)
        for through in _through(problem, reference):
            chosen[np.argpartition(through, n - some)[n - some :]] = True
    return np.flatnonzero(chosen)


def _through(problem: Problem, choice: Choice) -> list[Floats]:
    """Longest path through each stage, item edges taken for ``all``, ``(n_samples,)`` by stage."""
    stages = problem.stages
    own = [stage.latency[problem.upstream_row(i, choice), choice[i]] for i, stage in enumerate(stages)]
    zero = np.zeros(problem.n_samples, dtype=np.float32)
    head, tail = list(own), [zero] * len(stages)
    for i, stage in enumerate(stages):
        for p, _ in stage.parents:
            head[i] = np.maximum(head[i], head[p] + own[i])
    for i in reversed(range(len(stages))):
        for p, _ in stages[i].parents:
            tail[p] = np.maximum(tail[p], own[i] + tail[i])
    return [a + b + problem.driver for a, b in zip(head, tail, strict=True)]


def _typical(values: Floats, at: NDArray[np.intp], row: int | None) -> Floats:
    if row is None:
        return np.asarray(values[:, :, at].mean(axis=2).min(axis=0), dtype=np.float64)
    return np.asarray(values[row][:, at].mean(axis=1), dtype=np.float64)


class _Program:
    """A sparse linear program, built row by row: minimise c·x subject to A·x ≤ b, E·x = 1, x ≥ 0."""

    def __init__(self) -> None:
        self._size = 0
        self._cost: list[tuple[NDArray[np.intp], Floats]] = []
        self._upper: list[tuple[NDArray[np.intp], Floats, float]] = []
        self._even: list[tuple[NDArray[np.intp], Floats, float]] = []
        self._closed: list[int] = []

    def variables(self, count: int) -> NDArray[np.intp]:
        first, self._size = self._size, self._size + count
        return np.arange(first, self._size)

    def objective(self, x: NDArray[np.intp], weights: Floats) -> None:
        self._cost.append((x, weights))

    def close(self, x: NDArray[np.intp]) -> None:
        self._closed += x.tolist()

    def at_most(self, x: NDArray[np.intp], weights: Floats, bound: float) -> None:
        self._upper.append((x, weights, bound))

    def equal(self, x: NDArray[np.intp], weights: Floats, value: float) -> None:
        self._even.append((x, weights, value))

    def after(self, late: int, early: int, x: NDArray[np.intp] | None = None, time: Floats | None = None) -> None:
        """``late ≥ early + time · x``."""
        index, weight = np.array([early, late]), np.array([1.0, -1.0])
        if x is not None and time is not None:
            index, weight = np.concatenate([index, x]), np.concatenate([weight, time])
        self.at_most(index, weight, 0.0)

    def costs(self) -> Floats:
        total = np.zeros(self._size)
        for x, weights in self._cost:
            total[x] += weights
        return total

    def solve(self) -> tuple[Floats | None, Floats]:
        upper = np.full(self._size, inf)
        upper[self._closed] = 0.0
        right = np.array([bound for *_, bound in self._upper])
        solved = linprog(
            self.costs(),
            A_ub=self._matrix(self._upper), b_ub=np.where(np.isinf(right), 1e30, right),
            A_eq=self._matrix(self._even), b_eq=[value for *_, value in self._even],
            bounds=np.column_stack([np.zeros(self._size), upper]), method="highs",
        )  # fmt: skip
        if solved.status != 0:
            return None, np.empty(0)
        return solved.x, solved.ineqlin.marginals

    def _matrix(self, rows: list[tuple[NDArray[np.intp], Floats, float]]) -> coo_array:
        lengths = [len(x) for x, *_ in rows]
        where = (np.repeat(np.arange(len(rows)), lengths), np.concatenate([x for x, *_ in rows]))
        return coo_array((np.concatenate([w for _, w, _ in rows]), where), shape=(len(rows), self._size))

"""Anytime branch-and-bound over the menu, in topological order of the stages.

A node is a choice for the first *k* stages. Its bounds, from cheap to dear:

* mean cost so far plus the least of the open stages reaches the incumbent;
* per scenario, the Lagrangian bound of ``multipliers`` exceeds the incumbent in more scenarios than may be violated:
  a plan as good as the incumbent keeps its bounds in all but *k* scenarios, so it keeps them in one of any *k* + 1
  (quantile bound; Luedtke and Ahmed 2008, applied at every node);
* on graphs with branches, the quantile bounds of the paths, costs shared out between them (``paths``), add up to more;
* per scenario, the longest path of what is chosen plus the per-sample minimum of the rest exceeds the bound in too
  many scenarios (likewise for cost).

Counting over some of the scenarios bounds the count over all, so bounds look only at the *critical* ones, the slowest
under a good plan; a leaf is judged on all. The budget is counted in expanded nodes, never in time, so that the same
input gives the same plan on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np
from numpy.typing import NDArray

from prefect_slo.models.makespan import Progress, advance
from prefect_slo.planner.paired import paired_bound
from prefect_slo.planner.paths import PathBounds, restrict
from prefect_slo.planner.problem import ROUNDING, Choice, Goal, Problem
from prefect_slo.planner.relax import ScenarioBounds
from prefect_slo.planner.suffix import Suffix
from prefect_slo.planner.tails import fastest, tails

Floats = NDArray[np.floating]

NODE_LIMIT = 300
"""Expanded nodes before the best plan so far is returned: about a tenth of a second at 8 stages of 54 options. The plan
itself hardly gains from more (0.1 % at 1,500 nodes); the proof that it is optimal may."""

SHORT = 3
"""Paths of up to so many stages are searched to bound their cost."""

SHORT_NODES = 40
"""Nodes of such a search."""

NUMERIC_DEPTH = 2
"""Nodes down to this depth get a bound in numbers, which the reported gap rests on; deeper ones inherit it."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        choice: The best plan found; ``None`` when there is none.
        score: Its objective; infinite without a plan.
        lower_bound: No plan scores less.
        nodes: Nodes expanded.
        complete: Whether the search ran to its end: ``choice`` is then optimal, and ``None`` means infeasible.
    """

    choice: Choice | None
    score: float
    lower_bound: float
    nodes: int
    complete: bool

    @property
    def gap(self) -> float:
        """(score − lower bound) / score, 0 when proven optimal."""
        if self.complete or self.choice is None or self.score <= 0:
            return 0.0
        return max(0.0, (self.score - self.lower_bound) / self.score)


@dataclass(slots=True)
class _Node:
    depth: int
    choice: Choice
    mean_cost: float
    done: tuple[Progress, ...]
    least: Floats  # per critical scenario: longest path with everything open at its fastest
    paid: Floats  # per critical scenario: multipliers times what crosses the cut
    spent: Floats | None  # per critical scenario: cost so far
    value: Floats  # per critical scenario: lower bound of the score
    bound: float
    shares: Floats  # per path: its share of the cost so far
    paths: Floats  # per path: lower bound of its share of the cost
    beside: float  # cost so far of stages on no path


def search(
    problem: Problem,
    goal: Goal,
    *,
    incumbent: Choice | None = None,
    node_limit: int = NODE_LIMIT,
    reference: Choice | None = None,
) -> Found:
    """The best plan on the menu.

    Args:
        problem: Stages, options and samples.
        goal: Objective and bounds.
        incumbent: A plan to start from; one that breaks a bound is not believed.
        node_limit: Nodes to expand at most.
        reference: A plan whose slowest scenarios are taken as the critical ones; the incumbent by default.
    """
    if not all(mask.any() for mask in problem.allowed):
        return Found(None, inf, inf, 0, True)
    bounds = ScenarioBounds.of(problem, goal, reference or incumbent)
    return _Search(problem, goal, incumbent, bounds).run(node_limit)


class _Search:
    def __init__(self, problem: Problem, goal: Goal, incumbent: Choice | None, bounds: ScenarioBounds) -> None:
        self.problem, self.goal = problem, goal
        self.n = len(problem.stages)
        self.allowed = goal.allowed(problem.n_samples)
        self.best, self.score = incumbent, problem.score(incumbent, goal) if incumbent else inf
        if self.score == inf:
            self.best = None
        self.bounds = bounds
        self.critical, self.multipliers = self.bounds.problem, self.bounds.multipliers
        self.suffix, self.excused = self.bounds.suffix, self.bounds.excused
        self.cheapest = Suffix.of(self.critical, lambda i: problem.stages[i].mean_cost[:, :, None])
        self.budgeted = goal.cost_bound_usd < inf
        self.least_cost = Suffix.of(self.critical, lambda i: self.critical.stages[i].cost) if self.budgeted else None
        self.paths = _tightened(PathBounds.of(bounds, goal, self.best), problem, goal, self.best)
        self.beside = self.paths.least_beside(problem) if self.paths else np.zeros(self.n + 1)
        self.tail_end, self.tail_handover = tails(self.critical)
        self.nodes = 0

    def run(self, node_limit: int) -> Found:
        root = self._root()
        stack = [root]
        while stack and self.nodes < node_limit:
            node = stack.pop()
            if self._dead(node.value, node.bound):
                continue
            self.nodes += 1
            stack += self._expand(node)
        open_bounds = [node.bound for node in stack if not self._dead(node.value, node.bound)]
        if open_bounds:
            bound = min(self.score, max(min(open_bounds), self._paired()))
            return Found(self.best, self.score, bound - ROUNDING * abs(bound), self.nodes, False)
        return Found(self.best, self.score, self.score, self.nodes, True)

    def _paired(self) -> float:
        """A bound that two chance constraints don't loosen; worth its time only for the reported gap."""
        goal = self.goal
        if not self.budgeted or self.best is None or not (goal.latency_weight or goal.latency_bound_s < inf):
            return -inf
        return paired_bound(self.problem, goal, self.best)

    def _root(self) -> _Node:
        columns = self.critical.n_samples
        least = np.maximum.reduce([self.tail_start(i) for i in range(self.n) if not self.problem.stages[i].parents])
        value = self.bounds.root()
        bound = float(self.bounds.quantile(value[None])[0])
        none = np.empty(0)
        if self.paths:
            bound = max(bound, self.paths.weight * float(self.paths.root.sum() + self.beside[0]))
        spent = np.zeros(columns, dtype=np.float32) if self.budgeted else None
        return _Node(
            0, (), 0.0, (), least + self.critical.driver, self.bounds.constant, spent, value, bound,
            np.zeros_like(self.paths.root) if self.paths else none, self.paths.root if self.paths else none, 0.0,
        )  # fmt: skip

    def tail_start(self, i: int) -> Floats:
        """Least time from the start of a stage to the end, ``(n_columns,)``."""
        least, wave = fastest(self.critical, i)
        return np.maximum(least + self.tail_end[i], wave + self.tail_handover[i])

    def _expand(self, node: _Node) -> list[_Node]:
        k, problem, goal = node.depth, self.critical, self.goal
        stage = problem.stages[k]
        row = self.problem.upstream_row(k, node.choice)
        options = np.flatnonzero(self.problem.open_options(k, node.choice))
        mean = node.mean_cost + stage.mean_cost[row, options]
        rest_class = stage.class_of[options] if k in self.suffix.frontier[k + 1] else np.zeros(len(options), dtype=int)
        floor = mean + self.cheapest.rest_by_class(k + 1, node.choice)[:, 0][rest_class]
        keep = goal.cost_weight * floor < self._ceiling()
        if not keep.any():
            return []
        options, mean, floor, rest_class = options[keep], mean[keep], floor[keep], rest_class[keep]

        parents = {problem.stages[p].name: node.done[p] for p, _ in stage.parents}
        own = advance(stage.after, stage.latency[row, options], parents, stage.waves_at((options, None)))
        end, handover = own.finish, own.first
        paid = node.paid - self._crossing(k, node.done)
        value = paid + self._leaving(k, end, handover)
        value += (goal.cost_weight * mean).astype(np.float32)[:, None]
        spent = None
        if node.spent is not None:
            spent = node.spent + stage.cost[row, options]
            value += self.multipliers.cost_price * spent
        carried = value - (goal.cost_weight * mean).astype(np.float32)[:, None]
        if spent is not None:
            carried = carried - self.multipliers.cost_price * spent
        value = value + self.suffix.rest_by_class(k + 1, node.choice)[rest_class]

        least = np.maximum(node.least, end + (self.tail_end[k] + problem.driver))
        if self.problem_hands(k):
            least = np.maximum(least, handover + (self.tail_handover[k] + problem.driver))
        alive = self._alive(value, least, floor, spent, rest_class, k, node.choice)
        if k + 1 == self.n:
            self._leaves(node.choice, options[alive], mean[alive])
            return []
        bounds = np.full(len(options), node.bound)
        if k < NUMERIC_DEPTH:
            bounds[alive] = np.maximum(node.bound, self.bounds.quantile(value[alive]))
        shares: Floats = np.empty((len(options), 0))
        paths: Floats = shares
        beside = np.full(len(options), node.beside)
        if self.paths:
            shares, paths = self.paths.advance(
                k, node.choice, options, alive, mean - node.mean_cost, node.shares, node.paths, end
            )
            beside = beside if self.paths.through[k] else beside + mean - node.mean_cost
            total = self.paths.weight * (paths.sum(axis=1) + beside + self.beside[k + 1])
            bounds = np.maximum(bounds, total)
            alive = alive[bounds[alive] < self._ceiling()]
        order = alive[np.argsort(value[alive].mean(axis=1), kind="stable")]
        return [
            _Node(
                k + 1, (*node.choice, int(options[o])), float(mean[o]),
                (*node.done, Progress(handover[o], end[o])), least[o], carried[o],
                None if spent is None else spent[o], value[o], float(bounds[o]), shares[o], paths[o], float(beside[o]),
            )
            for o in order[::-1]
        ]  # fmt: skip

    def problem_hands(self, k: int) -> bool:
        """Whether a later stage reads this one item by item."""
        return bool(self.multipliers.network.into[k]["piece"])

    def _alive(
        self, value: Floats, least: Floats, floor: Floats, spent: Floats | None,
        rest_class: NDArray[np.int64], k: int, choice: Choice,
    ) -> NDArray[np.intp]:  # fmt: skip
        """Positions of the children that may still hold a plan better than the incumbent."""
        keep = np.count_nonzero(value > self._ceiling(), axis=1) <= self.excused
        limit = np.full(len(value), self.goal.latency_bound_s)
        if self.goal.latency_weight and self.score < inf:
            limit = np.minimum(limit, (self.score - self.goal.cost_weight * floor) / self.goal.latency_weight)
        if (limit < inf).any():
            keep &= np.count_nonzero(least > (limit * (1 + ROUNDING))[:, None], axis=1) <= self.allowed
        if spent is not None and self.least_cost is not None:
            total = spent + self.least_cost.rest_by_class(k + 1, choice)[rest_class]
            keep &= np.count_nonzero(total > self.goal.cost_bound_usd * (1 + ROUNDING), axis=1) <= self.allowed
        return np.flatnonzero(keep)

    def _leaves(self, choice: Choice, options: NDArray[np.intp], mean: Floats) -> None:
        for o in options[np.argsort(mean, kind="stable")]:
            leaf = (*choice, int(o))
            score = self.problem.score(leaf, self.goal)
            if score < self.score:
                self.best, self.score = leaf, score
                if not self.goal.latency_weight:
                    return

    def _crossing(self, k: int, done: Sequence[Progress]) -> Floats | float:
        """Multipliers times what flows into stage ``k`` from the stages chosen before it."""
        network, flow = self.multipliers.network, self.multipliers.flow
        total: Floats | float = 0.0
        for a in (*network.into[k]["start"], *network.into[k]["tail"]):
            arc = network.arcs[a]
            if arc.kind != "source":
                parent = done[arc.tail]
                total = total + flow[a] * (parent.first if arc.kind == "handover" else parent.finish)
        return total

    def _leaving(self, k: int, end: Floats, handover: Floats) -> Floats:
        """Multipliers times what flows out of stage ``k``, by option."""
        into, flow = self.multipliers.network.into[k], self.multipliers.flow
        through = flow[into["full"][0]] + sum(flow[a] for a in into["tail"])
        total = through * end
        for a in into["piece"]:
            total = total + flow[a] * handover
        return np.asarray(total)

    def _ceiling(self) -> float:
        """A node whose bound reaches this holds nothing better."""
        return self.score * (1 - 1e-9) if self.score < inf else inf

    def _dead(self, value: Floats, bound: float) -> bool:
        ceiling = self._ceiling()
        return bound >= ceiling or int(np.count_nonzero(value > ceiling)) > self.excused


def _tightened(paths: PathBounds | None, problem: Problem, goal: Goal, plan: Choice | None) -> PathBounds | None:
    """Path bounds in which short paths have been searched: on few stages, options do not mix and bounds are loose."""
    if paths is None or plan is None:
        return paths
    root = paths.root.copy()
    for p, path in enumerate(paths.paths):
        if len(path.stages) <= SHORT:
            chain, own = restrict(problem, list(path.stages), path.share), tuple(plan[i] for i in path.stages)
            plain = Goal(goal.percentile, goal.latency_bound_s)
            root[p] = max(root[p], search(chain, plain, incumbent=own, node_limit=SHORT_NODES).lower_bound)
    return replace(paths, root=root)

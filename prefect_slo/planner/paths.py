r"""A lower bound for graphs with parallel branches: one chance constraint per path, costs shared out between them.

In one scenario a single branch is slow, so the scenarios' bounds see one branch at its percentile and the others at
their typical speed; but a plan must have *every* path at its percentile. With paths *p* and shares
:math:`w_{ip} ≥ 0`, :math:`Σ_p w_{ip} = 1` of each stage's cost (Lagrangian decomposition; Guignard and Kim, Math.
Programming 39, 1987),

    cost of any plan ≥ Σ_p min { Σ_{i ∈ p} w_ip · C_i  :  Q(length of p) ≤ bound }

and each minimum is at least the quantile bound (``relax``) of its path. Paths and shares come from splitting the
multipliers' flow. In a branch-and-bound node, the finish of the stages chosen so far takes the place of their length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.capacity import Antichains
from prefect_slo.planner.multipliers import ascend
from prefect_slo.planner.network import Network
from prefect_slo.planner.problem import Choice, CompiledStage, Goal, Problem
from prefect_slo.planner.relax import ScenarioBounds
from prefect_slo.planner.suffix import Suffix
from prefect_slo.workflow import Edge

Floats = NDArray[np.floating]

PATHS = 8
"""Most paths; what flow is left on others is small by then."""

STAGES = 160
"""Most stages over all paths: a large graph spreads its flow over so many paths that few of them say little."""

PRICE_STEPS = 16
"""Steps of dual ascent on a path: there is but one price to find."""

LEAST_FLOW = 0.01
"""Paths with less of the flow than this are left out."""


@dataclass(frozen=True, eq=False)
class Path:
    """One path with its share of the costs, and the bounds of its scenarios.

    Attributes:
        stages: Positions in the problem, in topological order.
        share: Of the cost of each of them.
        price: Objective units per second of its length, ``(n_columns,)``.
        constant: ``(n_columns,)``.
        suffix: Least contributions of its open stages.
    """

    stages: tuple[int, ...]
    share: tuple[float, ...]
    price: Floats
    constant: Floats
    suffix: Suffix


@dataclass(frozen=True, eq=False)
class PathBounds:
    """Paths whose bounds add up.

    Attributes:
        paths: At least two.
        through: By stage, its paths as pairs of a path's index and the stage's place on it.
        root: Bound of each path with everything open, ``(n_paths,)``.
        excused: How many scenarios may lie above a plan's score.
        weight: Objective units per US dollar.
    """

    paths: tuple[Path, ...]
    through: tuple[tuple[tuple[int, int], ...], ...]
    root: Floats
    excused: int
    weight: float

    @classmethod
    def of(cls, bounds: ScenarioBounds, goal: Goal, plan: Choice | None) -> PathBounds | None:
        """The paths of a problem, or ``None`` where they bring nothing.

        They serve least mean cost under a latency bound (a cost bound besides only makes plans dearer) on graphs
        without item edges whose flow takes more than one path.

        Args:
            bounds: The scenarios' bounds, whose columns and flow are used.
            goal: Objective and bounds.
            plan: A good plan: decides how tight the bounds are, never whether they hold.
        """
        problem = bounds.problem
        items = any(kind == "item" for stage in problem.stages for _, kind in stage.parents)
        if plan is None or items or goal.latency_weight or not goal.cost_weight or goal.latency_bound_s == inf:
            return None
        near = np.argsort(bounds.root(), kind="stable")[-bounds.excused - 32 :]
        found = split(bounds.multipliers.network, bounds.multipliers.flow[:, near].mean(axis=1))
        if len(found) < 2:
            return None
        flow = np.zeros(len(problem.stages))
        for amount, stages in found:
            flow[stages] += amount
        plain = Goal(goal.percentile, goal.latency_bound_s)
        paths = tuple(_path(problem, plain, s, tuple(float(amount / flow[i]) for i in s), plan) for amount, s in found)
        through = tuple(
            tuple((p, path.stages.index(i)) for p, path in enumerate(paths) if i in path.stages)
            for i in range(len(problem.stages))
        )
        two = goal.cost_bound_usd < inf
        excused = bounds.excused // (1 + two)
        open_path = [_quantile((path.constant + path.suffix.rest(0, ()))[None], excused)[0] for path in paths]
        return cls(paths, through, np.array(open_path), excused, goal.cost_weight)

    def least_beside(self, problem: Problem) -> Floats:
        """Least mean cost of the stages ``k …`` that lie on no path, by depth ``k``, ``(n_stages + 1,)``."""
        costs = [
            0.0 if self.through[i] else float(stage.mean_cost[:, problem.allowed[i]].min())
            for i, stage in enumerate(problem.stages)
        ]
        return np.concatenate([np.cumsum(costs[::-1])[::-1], [0.0]])

    def advance(
        self,
        k: int,
        choice: Choice,
        options: NDArray[np.intp],
        alive: NDArray[np.intp],
        own: Floats,
        spent: Floats,
        before: Floats,
        end: Floats,
    ) -> tuple[Floats, Floats]:
        """Bounds of the paths after stage ``k`` took each of some options.

        Args:
            k: The stage.
            choice: What was chosen for the stages before it.
            options: Its options, ``(n_options,)``.
            alive: Which of them matter; the others keep the bounds so far.
            own: Its mean cost by option.
            spent: Shares of mean cost so far by path, ``(n_paths,)``.
            before: Bounds of the paths so far, ``(n_paths,)``.
            end: Its finish by option, ``(n_options, n_columns)``.

        Returns:
            Shares spent and bounds, ``(n_options, n_paths)`` each.
        """
        after = np.tile(before, (len(options), 1))
        costs = np.tile(spent, (len(options), 1))
        for p, at in self.through[k]:
            path = self.paths[p]
            costs[:, p] += path.share[at] * own
            chosen = tuple(choice[i] for i in path.stages[:at])
            rest = path.suffix.rest_by_class(at + 1, chosen)
            stage = path.suffix.problem.stages[at]
            told = at in path.suffix.frontier[at + 1]
            row = stage.class_of[options[alive]] if told else np.zeros(len(alive), dtype=int)
            value = path.constant + path.price * end[alive] + rest[row]
            after[alive, p] = np.maximum(before[p], costs[alive, p] + _quantile(value, self.excused))
        return costs, after


def split(network: Network, flow: Floats) -> list[tuple[float, list[int]]]:
    """Paths that make up a flow on a graph without item edges, the widest first.

    Args:
        network: The expanded graph.
        flow: ``(n_arcs,)``.

    Returns:
        Pairs of a path's flow and its stages.
    """
    flow = np.asarray(flow, dtype=float).copy()
    sinks = [a for a, arc in enumerate(network.arcs) if arc.kind == "sink"]
    size = flow[sinks].sum()
    found: list[tuple[float, list[int]]] = []
    while len(found) < min(PATHS, max(1, STAGES // network.n_stages)):
        width, by = np.zeros(network.n_stages), np.zeros(network.n_stages, dtype=int)
        for i in range(network.n_stages):
            for a in network.into[i]["start"]:
                arc = network.arcs[a]
                here = flow[a] if arc.kind == "source" else min(width[arc.tail], flow[a])
                if here > width[i]:
                    width[i], by[i] = here, a
        last = max(sinks, key=lambda a: min(width[network.arcs[a].tail], flow[a]))
        amount = float(min(width[network.arcs[last].tail], flow[last]))
        if amount <= LEAST_FLOW * size:
            break
        path, a = [], last
        while network.arcs[a].kind != "source":
            flow[a] -= amount
            path.append(network.arcs[a].tail)
            a = int(by[path[-1]])
        flow[a] -= amount
        found.append((amount, path[::-1]))
    return found


def restrict(problem: Problem, path: list[int], shares: tuple[float, ...]) -> Problem:
    """The chain of some stages, each with a share of its cost.

    A stage that also depends on workers off the path takes the least over them, in every sample and on average.
    """
    stages: list[CompiledStage] = []
    for at, i in enumerate(path):
        stage = problem.stages[i]
        single = at > 0 and [p for p, _ in stage.parents] == [path[at - 1]]
        free = bool(stage.upstream) and not single
        mean = stage.mean_cost.min(axis=0, keepdims=True) if free else stage.mean_cost
        latency = stage.latency.min(axis=0, keepdims=True) if free else stage.latency
        stages.append(
            replace(
                stage,
                after=(Edge(problem.stages[path[at - 1]].name),) if at else (),
                parents=((at - 1, "all"),) if at else (),
                latency=latency,
                cost=latency,
                mean_cost=mean * shares[at],
                upstream={} if free else stage.upstream,
            )
        )
    none = Antichains([], frozenset(), tuple(np.empty((len(s.options), 0)) for s in stages), np.empty(0))
    allowed = tuple(problem.allowed[i] for i in path)
    return replace(problem, stages=tuple(stages), rules={}, allowed=allowed, antichains=none)


def _path(problem: Problem, goal: Goal, stages: list[int], shares: tuple[float, ...], plan: Choice) -> Path:
    chain = restrict(problem, stages, shares)
    own = [plan[i] for i in stages]
    rows = [chain.upstream_row(at, own) for at in range(len(stages))]
    multipliers = ascend(chain, goal, rows, PRICE_STEPS)
    suffix = Suffix.of(chain, lambda at: multipliers.stage(chain, goal, at))
    return Path(tuple(stages), shares, multipliers.latency_price, multipliers.constant(chain, goal), suffix)


def _quantile(values: Floats, excused: int) -> Floats:
    rank = values.shape[1] - 1 - excused
    if rank < 0:
        return np.full(len(values), -inf)
    return np.asarray(np.partition(values, rank, axis=1)[:, rank], dtype=np.float64)

"""One sampled problem, solved for several goals: what does not depend on the goal is done once.

Dominated options are left out, sweeps and moves find a good plan, branch-and-bound finds a better one or proves that
there is none. A plan for a promise is searched for several times, with its bounds moved each time, so that what is left
of the menu and where searches start are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from prefect_slo.planner.dominance import Reduced
from prefect_slo.planner.incumbent import Start, begin, polish
from prefect_slo.planner.problem import Choice, Goal, Problem, percentile
from prefect_slo.planner.relax import quantile_bound
from prefect_slo.planner.search import NODE_LIMIT, Found, search
from prefect_slo.planner.sweep import Sweeps

EVEN = 0.001
"""Plans whose latency differs by less than this are taken for equally fast: nobody wants to pay for the difference."""

_TIGHTENINGS = 8


class Solver:
    """Plans of one problem; choices are those of the whole problem.

    Args:
        problem: Stages, options and samples.
        node_limit: Budget of each search, in nodes.
    """

    def __init__(self, problem: Problem, node_limit: int = NODE_LIMIT) -> None:
        self.problem = problem
        self.node_limit = node_limit
        self._reduced: dict[bool, tuple[Reduced, Sweeps]] = {}

    def start(self, goal: Goal, known: Sequence[Choice] = ()) -> Start:
        """Where a search starts; see ``incumbent.begin``.

        Args:
            goal: Objective and bounds.
            known: Further plans to start from.
        """
        reduced, sweeps = self._left(goal)
        found = begin(reduced.problem, goal, self._within(reduced, known), sweeps=sweeps)
        plan, reference = (None if c is None else reduced.whole(c) for c in (found.plan, found.reference))
        return Start(plan, reference)

    def solve(self, goal: Goal, known: Sequence[Choice] = ()) -> Found:
        """A good plan by sweeps and moves, then branch-and-bound; arguments as in ``start``."""
        reduced, sweeps = self._left(goal)
        problem = reduced.problem
        first = begin(problem, goal, self._within(reduced, known), sweeps=sweeps)
        found = search(
            problem, goal, incumbent=first.plan, node_limit=self.node_limit, reference=first.reference
        )  # fmt: skip
        return found if found.choice is None else replace(found, choice=reduced.whole(found.choice))

    def thrifty(self, goal: Goal, found: Found) -> Found:
        """Of plans about as fast as one found for a budget, the cheapest that moves reach."""
        if found.choice is None or not goal.latency_weight or goal.cost_weight:
            return found
        slower = percentile(self.problem.latency(found.choice), goal.allowed(self.problem.n_samples)) * (1 + EVEN)
        cheapest = Goal(goal.percentile, min(slower, goal.latency_bound_s), goal.cost_bound_usd)
        plan = self.start(cheapest, (found.choice,)).plan
        if plan is None or plan == found.choice:
            return found
        return replace(found, choice=plan, score=self.problem.score(plan, goal), complete=False)

    def safest(self, goal: Goal) -> Found:
        """The plan with most room to its bound, where the cheapest could not be certified or none was found."""
        none = Found(None, inf, -inf, 0, False)
        if goal.latency_bound_s == inf:
            choice = self.frugal(goal.percentile) if goal.cost_bound_usd < inf else None
        else:
            choice = self.solve(goal.fastest()).choice
        score = self.problem.score(choice, goal) if choice is not None else inf
        if choice is None or score == inf:
            return none
        return Found(choice, score, quantile_bound(self.problem, goal, choice), 0, False)

    def frugal(self, at: float) -> Choice | None:
        """The plan of least cost at a percentile: the cheapest on average, then ever tighter budgets."""
        allowed = Goal(at).allowed(self.problem.n_samples)
        best = self.solve(Goal(at)).choice
        for _ in range(_TIGHTENINGS):
            if best is None:
                return None
            tighter = percentile(self.problem.cost(best), allowed) * (1 - 1e-3)
            found = self.solve(Goal(at, cost_bound_usd=tighter))
            if found.choice is None:
                return best
            best = found.choice
        return best

    def nominal(self, goal: Goal, known: Sequence[Choice]) -> float:
        """About the best score: what moves make of known plans."""
        reduced, _ = self._left(goal)
        problem = reduced.problem
        scored = [(problem.score(choice, goal), choice) for choice in self._within(reduced, known)]
        score, choice = min(scored, default=(inf, ()))
        if score == inf:
            return inf
        return polish(problem, goal, choice, score)[1]

    def _left(self, goal: Goal) -> tuple[Reduced, Sweeps]:
        costs = goal.cost_bound_usd < inf
        if costs not in self._reduced:
            reduced = Reduced.of(self.problem, goal)
            self._reduced[costs] = reduced, Sweeps(reduced.problem)
        return self._reduced[costs]

    @staticmethod
    def _within(reduced: Reduced, known: Sequence[Choice]) -> list[Choice]:
        return [choice for whole in known if (choice := reduced.within(whole)) is not None]


def solve(problem: Problem, goal: Goal, node_limit: int = NODE_LIMIT, start: Choice | None = None) -> Found:
    """The plan of one goal."""
    return Solver(problem, node_limit).solve(goal, () if start is None else (start,))

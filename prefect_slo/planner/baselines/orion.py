"""Orion (Mahgoub et al., OSDI 2022): right-sizing by best-first search on a distribution model.

All functions start at their smallest size. The state of least predicted percentile is taken from a queue; when it meets
the target the search ends, else each function in turn grows by one size (§4.2). Worker counts are no choice of Orion's:
every count of the menu is tried for all stages, and the cheapest result kept. Give it a model of kind ``empirical`` to
have Orion's own percentiles (§4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from math import inf

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.objective import Objective, Slo
from prefect_slo.plan import Plan
from prefect_slo.planner.baselines.grid import nearest_workers, sizes_at
from prefect_slo.planner.goals import goal_of
from prefect_slo.planner.make import uncertified
from prefect_slo.planner.problem import Choice, Goal, Problem, percentile
from prefect_slo.planner.sampling import Sampler, TableSource

STATES = 5_000
"""States that the search looks at before it settles for the fastest seen."""


def orion(
    model: TableSource, objective: Objective, *, seed: int = 0, samples: int = 2000, workers: int | None = None
) -> Plan:
    """The plan of Orion's right-sizing; under a budget, the fastest state on the way that keeps it.

    Args:
        model: Draws samples per menu option.
        objective: A latency bound, a budget or both.
        seed: Of the samples.
        samples: How many.
        workers: Workers of every stage (the nearest count on its menu); by default each count is tried.

    Raises:
        InfeasibleSlo: Nothing fits the workflow's constraints and capacity.
    """
    sampler, goal = Sampler(model, seed, samples=samples), goal_of(objective)
    problem = sampler.problem()
    counts = {int(count) for stage in problem.stages for count in stage.classes} if workers is None else {workers}
    found = [_sized(problem, goal, count) for count in sorted(counts)]
    ranked = [(_rank(problem, goal, choice), choice) for choice in found if choice is not None]
    if not ranked:
        raise InfeasibleSlo("a plan", None, problem.stages[0].name, 0.0)
    return uncertified(sampler, problem, min(ranked)[1], Slo.of(objective))


def right_size(
    levels: Sequence[int],
    latency: Callable[[tuple[int, ...]], float],
    target: float,
    *,
    admit: Callable[[tuple[int, ...]], bool] = lambda state: True,
    states: int = STATES,
) -> tuple[int, ...] | None:
    """Best-first search over sizes.

    Args:
        levels: How many sizes each function has.
        latency: Predicted percentile of a state (one size index per function).
        target: Where the search ends.
        admit: States that may be visited.
        states: How many are looked at most.

    Returns:
        The first state from the queue that meets the target, or the fastest seen; ``None`` where none is admitted.
    """
    start = (0,) * len(levels)
    if not admit(start):
        return None
    queue = [(latency(start), start)]
    seen, best = {start}, queue[0]
    while queue:
        best = min(best, queue[0])
        value, state = heappop(queue)
        if value <= target:
            return state
        for i, level in enumerate(levels):
            grown = (*state[:i], state[i] + 1, *state[i + 1 :])
            if grown[i] < level and grown not in seen and len(seen) < states and admit(grown):
                seen.add(grown)
                heappush(queue, (latency(grown), grown))
    return best[1]


def _sized(problem: Problem, goal: Goal, workers: int) -> Choice | None:
    lines = [
        sizes_at(stage, mask, nearest_workers(stage, mask, workers))
        for stage, mask in zip(problem.stages, problem.allowed, strict=True)
    ]
    allowed = goal.allowed(problem.n_samples)

    def choice(state: tuple[int, ...]) -> Choice:
        return tuple(line[at] for line, at in zip(lines, state, strict=True))

    def latency(state: tuple[int, ...]) -> float:
        return percentile(problem.latency(choice(state)), allowed)

    def admit(state: tuple[int, ...]) -> bool:
        plan = choice(state)
        within = goal.cost_bound_usd == inf or percentile(problem.cost(plan), allowed) <= goal.cost_bound_usd
        return within and problem.admits(plan)

    target = goal.latency_bound_s if goal.latency_bound_s < inf else 0.0
    state = right_size([len(line) for line in lines], latency, target, admit=admit)
    return None if state is None else choice(state)


def _rank(problem: Problem, goal: Goal, choice: Choice) -> tuple[float, float]:
    slow = percentile(problem.latency(choice), goal.allowed(problem.n_samples))
    return problem.score(choice, goal), slow

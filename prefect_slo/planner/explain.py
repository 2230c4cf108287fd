"""Why a plan is what it is: where its time and money go, and what a change would bring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from prefect_slo.errors import InvalidPlan
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.planner.batch import admitted, costs, latencies, mean_costs, rows_of
from prefect_slo.planner.criticality import Criticality, criticality
from prefect_slo.planner.goals import goal_of
from prefect_slo.planner.problem import ROUNDING, Choice, Goal, Problem, percentile
from prefect_slo.planner.relax import relax
from prefect_slo.planner.sampling import Sampler, TableSource
from prefect_slo.resources import Option


@dataclass(frozen=True)
class Alternative:
    """Another option for one stage, everything else left as it is.

    Attributes:
        option: The option.
        cost_change_usd: Change of mean cost.
        latency_change_s: Change of latency at the percentile.
        keeps_bounds: Whether the objective would still be kept, in the samples.
    """

    option: Option
    cost_change_usd: float
    latency_change_s: float
    keeps_bounds: bool


@dataclass(frozen=True)
class StageReason:
    """Why a stage is sized as it is.

    Attributes:
        criticality: Where its time and money go.
        option: What was chosen.
        cheaper: The cheapest other option that costs less, or the one nearest to keeping the bound; ``None`` when the
            stage is already at its cheapest.
        faster: The option that buys most seconds per dollar; ``None`` when none is faster.
        best: The best alternative that keeps the objective; ``None`` when there is none.
        why: The same in words.
    """

    criticality: Criticality
    option: Option
    cheaper: Alternative | None
    faster: Alternative | None
    best: Alternative | None
    why: str


@dataclass(frozen=True)
class Explanation:
    """Why a plan is what it is.

    Attributes:
        latency_s: Latency at the percentile, in these samples.
        cost_usd: Mean cost.
        price_of_second: US dollars that one second more of the bound would save: the dual of the bound in the linear
            program of the samples near the percentile. ``None`` without a latency bound.
        seconds_per_dollar: For a budget, seconds that one US dollar more would save; ``None`` without one.
        stages: One reason per stage, in the workflow's own order.
    """

    latency_s: float
    cost_usd: float
    price_of_second: float | None
    seconds_per_dollar: float | None
    stages: tuple[StageReason, ...]


def explain(
    model: TableSource, plan: Plan, *, seed: int | None = None, cold: bool | float = False, samples: int = 4000
) -> Explanation:
    """Explain a plan whose options are on the menu.

    Args:
        model: What it was made with.
        plan: The plan; without an objective its own latency is taken as the bound.
        seed: Of the samples; the plan's own by default.
        cold: Workers start cold.
        samples: How many.

    Raises:
        InvalidPlan: A stage is missing, or an option of the plan is not on its stage's menu.
    """
    problem = Sampler(model, plan.seed if seed is None else seed, cold, samples=samples).problem()
    choice = choice_of(problem, plan.stages)
    goal = goal_of(plan.objective) if plan.objective else Goal()
    if plan.objective is None:
        own = percentile(problem.latency(choice), goal.allowed(problem.n_samples))
        goal = replace(goal, latency_bound_s=own)
    return explain_choice(problem, goal, choice)


def choice_of(problem: Problem, stages: Mapping[str, StagePlan]) -> Choice:
    """The option indices of stage plans.

    Raises:
        InvalidPlan: A stage is missing, or its option is not on the menu.
    """
    choice = []
    for stage in problem.stages:
        if stage.name not in stages:
            raise InvalidPlan("plan.stages", sorted(stages), f"a stage plan for {stage.name!r} too")
        option = stages[stage.name].option
        if option not in stage.options:
            raise InvalidPlan(f"plan.{stage.name}", str(option.size), f"one of the {len(stage.options)} menu options")
        choice.append(stage.options.index(option))
    return tuple(choice)


def explain_choice(problem: Problem, goal: Goal, choice: Choice) -> Explanation:
    """Explain a choice on a sampled problem; see ``explain``."""
    latency = problem.latency(choice)
    allowed = goal.allowed(problem.n_samples)
    now, cost = percentile(latency, allowed), problem.mean_cost(choice)
    rank = problem.n_samples - 1 - allowed
    width = max(1, problem.n_samples // 50)
    near = np.argsort(latency, kind="stable")[max(0, rank - width) : rank + width + 1]
    rows = [problem.upstream_row(i, choice) for i in range(len(problem.stages))]
    second = dollar = None
    if goal.latency_bound_s < inf:
        # the mean over samples near the percentile stands in for a scenario at it, so the bound moves along
        offset = float(latency[near].mean()) - now
        bound = replace(goal, latency_bound_s=goal.latency_bound_s + offset, cost_bound_usd=inf)
        price = relax(problem, bound, near, rows).price_of_second
        second = price if price < inf else None
    elif goal.cost_bound_usd < inf:
        price = relax(problem, goal, near, rows).price_of_dollar
        dollar = price if price < inf else None
    reasons = {
        problem.stages[i].name: _reason(problem, goal, choice, i, which, now, cost)
        for i, which in enumerate(criticality(problem, choice))
    }
    return Explanation(now, cost, second, dollar, tuple(reasons[stage.name] for stage in problem.workflow.stages))


def _reason(
    problem: Problem, goal: Goal, choice: Choice, i: int, which: Criticality, now: float, cost: float
) -> StageReason:
    others = _alternatives(problem, goal, choice, i, now, cost)
    cheaper = min(
        (a for a in others if a.cost_change_usd < 0),
        key=lambda a: (not a.keeps_bounds, a.cost_change_usd if a.keeps_bounds else a.latency_change_s),
        default=None,
    )
    faster = min(
        (a for a in others if a.latency_change_s < -1e-3 * now),
        key=lambda a: max(a.cost_change_usd, 0.0) / -a.latency_change_s,
        default=None,
    )

    def change(a: Alternative) -> float:
        return goal.cost_weight * a.cost_change_usd + goal.latency_weight * a.latency_change_s

    best = min((a for a in others if a.keeps_bounds), key=change, default=None)
    option = problem.stages[i].options[choice[i]]
    return StageReason(which, option, cheaper, faster, best, _words(which, goal, now, cheaper, faster))


def _alternatives(problem: Problem, goal: Goal, choice: Choice, i: int, now: float, cost: float) -> list[Alternative]:
    options = np.array([o for o in np.flatnonzero(problem.allowed[i]) if o != choice[i]], dtype=np.intp)
    trials = np.tile(np.array(choice, dtype=np.intp), (len(options), 1))
    trials[:, i] = options
    if not len(trials):
        return []
    fits = admitted(problem, trials)
    trials, options = trials[fits], options[fits]
    rows = rows_of(problem, trials)
    allowed = goal.allowed(problem.n_samples)
    mean = mean_costs(problem, trials, rows)
    found = []
    for at in range(len(trials)):
        one, row = trials[at : at + 1], rows[at : at + 1]
        slow = percentile(latencies(problem, one, row)[0], allowed)
        kept = slow <= goal.latency_bound_s * (1 + ROUNDING)
        if kept and goal.cost_bound_usd < inf:
            kept = percentile(costs(problem, one, row)[0], allowed) <= goal.cost_bound_usd * (1 + ROUNDING)
        option = problem.stages[i].options[options[at]]
        found.append(Alternative(option, float(mean[at] - cost), slow - now, bool(kept)))
    return found


def _words(which: Criticality, goal: Goal, now: float, cheaper: Alternative | None, faster: Alternative | None) -> str:
    place = f"on the longest path in {which.probability:.0%} of runs ({which.path_share:.0%} of its time)"
    if cheaper is None:
        return f"{place}; already at its cheapest option"
    change = f"{_named(cheaper.option)} would save ${-cheaper.cost_change_usd:.3g}"
    if not cheaper.keeps_bounds and goal.latency_bound_s < inf:
        late = now + cheaper.latency_change_s
        return f"{place}; {change} but take p{100 * goal.percentile:g} to {late:.4g} s, over {goal.latency_bound_s:g} s"
    if faster is not None and goal.latency_weight:
        return f"{place}; {change}, and {_named(faster.option)} would be {-faster.latency_change_s:.3g} s faster"
    return f"{place}; {change} and add {max(cheaper.latency_change_s, 0.0):.3g} s"


def _named(option: Option) -> str:
    batch = f", batch {option.batch}" if option.batch > 1 else ""
    return f"{option.workers} × {option.size}{batch}"

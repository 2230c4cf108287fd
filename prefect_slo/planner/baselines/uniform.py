"""One setting for all stages: what a person picks who sizes the whole workflow by one number."""

from __future__ import annotations

from math import inf

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.objective import Objective, Slo
from prefect_slo.plan import Plan
from prefect_slo.planner.goals import goal_of
from prefect_slo.planner.make import uncertified
from prefect_slo.planner.problem import Choice, Problem, percentile
from prefect_slo.planner.sampling import Sampler, TableSource
from prefect_slo.resources import Option


def uniform(model: TableSource, objective: Objective, *, seed: int = 0, samples: int = 2000) -> Plan:
    """The best plan in which every stage runs on the same number of workers of the same size.

    A stage whose menu lacks the setting takes its nearest: the most workers not above it and the size nearest in vCPU.
    When no setting keeps the objective, the fastest one is taken.

    Raises:
        InfeasibleSlo: No setting fits the workflow's constraints and capacity.
    """
    sampler = Sampler(model, seed, samples=samples)
    problem, goal = sampler.problem(), goal_of(objective)
    settings = dict.fromkeys(option for stage in problem.stages for option in stage.options)
    choices = list(dict.fromkeys(_nearest(problem, setting) for setting in settings))
    choices = [choice for choice in choices if problem.admits(choice)]
    if not choices:
        raise InfeasibleSlo("a plan", None, problem.stages[0].name, 0.0)
    scores = [problem.score(choice, goal) for choice in choices]
    if min(scores) == inf:
        allowed = goal.allowed(problem.n_samples)
        scores = [percentile(problem.latency(choice), allowed) for choice in choices]
    return uncertified(sampler, problem, choices[scores.index(min(scores))], Slo.of(objective))


def _nearest(problem: Problem, setting: Option) -> Choice:
    return tuple(
        min(range(len(stage.options)), key=lambda o, s=stage: _distance(s.options[o], setting))  # type: ignore[misc]
        for stage in problem.stages
    )


def _distance(option: Option, setting: Option) -> tuple[float, ...]:
    return (
        option.pool != setting.pool,
        option.workers > setting.workers,
        abs(option.workers - setting.workers),
        abs(option.size.vcpus - setting.size.vcpus),
        abs(option.size.memory_mb - setting.size.memory_mb),
        abs(option.batch - setting.batch),
    )

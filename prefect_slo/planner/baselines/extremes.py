"""Everything at its smallest, and everything at its largest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.objective import Objective, Slo
from prefect_slo.plan import Plan
from prefect_slo.planner.make import uncertified
from prefect_slo.planner.problem import Problem
from prefect_slo.planner.sampling import Sampler, TableSource
from prefect_slo.resources import Option

SAMPLES = 200
"""Samples of the table: the choice needs the menu alone, so a few do."""


def all_min(model: TableSource, objective: Objective, *, seed: int = 0) -> Plan:
    """Every stage on its fewest and smallest workers.

    Raises:
        InfeasibleSlo: No combination fits the workflow's constraints and capacity.
    """
    return _extreme(model, objective, seed, lambda option: -_amount(option))


def all_max(model: TableSource, objective: Objective, *, seed: int = 0) -> Plan:
    """Every stage on its most and largest workers, as far as constraints and capacity allow.

    Raises:
        InfeasibleSlo: No combination fits the workflow's constraints and capacity.
    """
    return _extreme(model, objective, seed, _amount)


def _amount(option: Option) -> float:
    return option.workers * (option.size.vcpus + option.size.gpu) + 1e-9 * option.size.memory_mb


def _extreme(model: TableSource, objective: Objective, seed: int, rank: Callable[[Option], float]) -> Plan:
    sampler = Sampler(model, seed, samples=SAMPLES)
    problem = sampler.problem()
    choice: list[int] = []
    for i, stage in enumerate(problem.stages):
        options = np.flatnonzero(problem.open_options(i, choice))
        if not options.size:
            raise InfeasibleSlo("a plan", None, stage.name, 0.0)
        choice.append(int(max(options, key=lambda o: rank(stage.options[o]))))
    return uncertified(sampler, _checked(problem, choice), choice, Slo.of(objective))


def _checked(problem: Problem, choice: list[int]) -> Problem:
    if not problem.admits(choice):
        raise InfeasibleSlo("a plan", None, problem.stages[-1].name, 0.0)
    return problem

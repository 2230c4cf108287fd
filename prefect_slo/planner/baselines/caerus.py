"""Caerus (Zhang et al., NSDI 2021): every stage gets workers in proportion to the bytes that it reads.

Its launch times (start each step as soon, or as late, as its inputs allow; §4) don't apply where a stage starts when
its parents end; what is left of it as a planner is the degree of parallelism, fixed before (§3).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prefect_slo.errors import UnknownStage
from prefect_slo.objective import Objective
from prefect_slo.plan import Plan
from prefect_slo.planner.baselines.allocation import Divide, Floats, allocate
from prefect_slo.planner.problem import Problem
from prefect_slo.planner.sampling import TableSource


def caerus(
    model: TableSource,
    objective: Objective,
    *,
    seed: int = 0,
    samples: int = 2000,
    input_bytes: Mapping[str, float] | None = None,
) -> Plan:
    """The best plan whose workers are in proportion to input bytes.

    Args:
        model: Draws samples per menu option.
        objective: A latency bound, a budget or both.
        seed: Of the samples.
        samples: How many.
        input_bytes: By stage, in any unit; without them, stages count as reading in proportion to their work.

    Raises:
        InfeasibleSlo: Nothing fits the workflow's constraints and capacity.
        UnknownStage: ``input_bytes`` lacks a stage.
    """

    def divide(problem: Problem) -> Divide:
        if input_bytes is None:
            return in_proportion
        for stage in problem.stages:
            if stage.name not in input_bytes:
                raise UnknownStage(stage.name, tuple(input_bytes))
        amounts = np.array([input_bytes[stage.name] for stage in problem.stages], dtype=float)
        return lambda work, slots: in_proportion(amounts, slots)

    return allocate(model, objective, divide, seed=seed, samples=samples)


def in_proportion(amounts: Floats, slots: float) -> Floats:
    """Workers by stage, ``(n_stages,)``, not rounded; at least one each."""
    shares = np.asarray(amounts, dtype=float) / max(float(np.sum(amounts)), 1e-300)
    return np.maximum(slots * shares, 1.0)

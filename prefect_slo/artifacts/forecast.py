"""What a plan says of its stages, and what a run made of it: the values that the views show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from prefect_slo.plan import Plan

if TYPE_CHECKING:
    from prefect_slo.models import WorkflowModel

_NUDGE = 1e-3
_SHOWN = (9, 1)
"""Tag of these draws after the plan's seed; a stream that its search has not seen (see ``simulate.SIMULATED``)."""


@dataclass(frozen=True)
class StageForecast:
    """What a plan predicts of one stage, under the model.

    Attributes:
        mean_s: Mean wall time.
        p95_s: 95th percentile of wall time.
        cost_usd: Mean cost; ``nan`` where unknown.
        critical: Probability that the stage lies on the longest path.
    """

    mean_s: float
    p95_s: float
    cost_usd: float = math.nan
    critical: float = 0.0


@dataclass(frozen=True)
class RunActual:
    """What one run of a plan took.

    Attributes:
        latency_s: Latency of the run.
        cost_usd: Its cost; ``nan`` where unknown.
        untold: Invocations and jobs whose bills nobody has told; what they cost comes beside.
        stages: Wall time of every stage that ran, in seconds.
    """

    latency_s: float
    cost_usd: float = math.nan
    stages: Mapping[str, float] = field(default_factory=dict)
    untold: int = 0


def stage_forecasts(model: WorkflowModel, plan: Plan, *, n_samples: int = 4000) -> dict[str, StageForecast]:
    """What a model says of each stage under a plan.

    A stage counts as critical in a sample where shortening it shortens the run by at least half as much: the same as
    lying on the longest path, but for ties, and for stages that hand their items on one by one.
    """
    from prefect_slo.models import makespan

    workflow = model.workflow
    drawn = model.sample_plan(plan, n_samples, np.random.default_rng(np.random.SeedSequence([plan.seed, *_SHOWN])))
    walls = {name: np.asarray(drawn.stage_latency_s[name], dtype=np.float64) for name in workflow.order}
    waves = {name: _waves(workflow[name].items, plan[name].workers, plan[name].batch) for name in workflow.order}
    starts = drawn.stage_start_s
    whole = makespan(workflow, walls, waves=waves, start_s=starts)
    found = {}
    for name, wall in walls.items():
        shorter = makespan(workflow, {**walls, name: wall * (1 - _NUDGE)}, waves=waves, start_s=starts)
        critical = (wall > 0) & (whole - shorter >= 0.5 * _NUDGE * wall)
        cost = float(np.mean(drawn.stage_cost_usd[name]))
        found[name] = StageForecast(float(wall.mean()), float(np.quantile(wall, 0.95)), cost, float(critical.mean()))
    return found


def _waves(items: int | None, workers: int, batch: int) -> float:
    """Calls that the busiest worker makes; 1 for work that is divided over the workers."""
    return max(1.0, math.ceil(math.ceil((items or 0) / batch) / workers))

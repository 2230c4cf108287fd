"""Forecasts of stages agree with the model, and the critical path is where time saved is saved in all."""

from __future__ import annotations

import numpy as np
import pytest

from prefect_slo.artifacts import stage_forecasts
from prefect_slo.models import WorkflowModel
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import Menu, Size
from prefect_slo.workflow import Edge, Stage, Workflow

MENU = Menu(workers=(1, 2))
WORK = {"start": 1.0, "long": 4.0, "short": 1.0, "end": 2.0}
PLAN = Plan("w", None, {name: StagePlan(1, Size(1, 1024)) for name in WORK})


def _fitted(work: dict[str, float]) -> WorkflowModel:
    both = (Edge("long"), Edge("short"))
    workflow = Workflow(
        "w",
        (
            Stage("start", menu=MENU),
            Stage("long", (Edge("start"),), menu=MENU),
            Stage("short", (Edge("start"),), menu=MENU),
            Stage("end", both, menu=MENU),
        ),
    )
    rng = np.random.default_rng(0)
    rows = [
        StageRun(f"{d}-{i}", name, d, 1024, 1.0, seconds / d * float(rng.lognormal(0, 0.05)), overhead_s=0.0)
        for d in (1, 2)
        for i in range(6)
        for name, seconds in work.items()
    ]
    return WorkflowModel(workflow).fit(StageRuns.of(rows))


def test_the_longer_branch_is_critical_and_the_shorter_is_not() -> None:
    model = _fitted(WORK)
    found = stage_forecasts(model, PLAN)
    for name, work in WORK.items():
        assert found[name].mean_s == pytest.approx(work, rel=0.1)
        assert found[name].mean_s < found[name].p95_s
        assert found[name].cost_usd > 0
    assert {name: found[name].critical for name in WORK} == {"start": 1.0, "long": 1.0, "short": 0.0, "end": 1.0}
    assert found == stage_forecasts(model, PLAN)


def test_two_branches_of_like_length_share_the_critical_path() -> None:
    found = stage_forecasts(_fitted({**WORK, "short": 4.0}), PLAN)
    assert 0.1 < found["short"].critical < 0.9
    assert found["short"].critical + found["long"].critical == pytest.approx(1.0, abs=0.01)

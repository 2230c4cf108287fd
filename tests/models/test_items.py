"""How many items a run has: as many as the workflow says, where it does, else as many as were measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from prefect_slo.models import WorkflowModel
from prefect_slo.models.inputs import Inputs
from prefect_slo.objective import Latency
from prefect_slo.planner import make_plan
from prefect_slo.resources import Option, Size
from prefect_slo.workflow import Workflow

FILE = {
    "name": "resize",
    "menu": {"workers": [1, 2, 4, 8]},
    "stages": [{"name": "resize", "fanout": "given"}],
}


def workflow(items: int | None) -> Workflow:
    read = Workflow.from_document(FILE)
    return replace(read, stages=tuple(replace(stage, items=items) for stage in read.stages))


def table(*items: int) -> dict[str, list[object]]:
    """0.2 s an item and 0.3 s beside, on one to eight workers, with 2 % of noise."""
    rng = np.random.default_rng(7)
    rows = []
    for run in range(48):
        workers, n = (1, 2, 4, 8)[run % 4], items[run % len(items)]
        wall = (0.3 + 0.2 * np.ceil(n / workers)) * np.exp(0.02 * rng.standard_normal())
        rows.append((f"r{run}", "resize", workers, 1024, wall, 0.02 * wall, n))
    names = ("run_id", "stage", "workers", "memory_mb", "wall_s", "overhead_s", "items")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def mean_s(model: WorkflowModel, workers: int) -> float:
    return model.predict({"resize": Option(workers, Size(1, 1024))}).latency_s.mean


@pytest.mark.parametrize("items", [8, 24, 80])
def test_times_are_predicted_for_the_items_that_the_workflow_says(items: int) -> None:
    model = WorkflowModel(workflow(items)).fit(table(24))
    for workers in (2, 8):
        assert mean_s(model, workers) == pytest.approx(0.3 + 0.2 * np.ceil(items / workers), rel=0.06)
    assert model.stage_time("resize", workers=4, memory_mb=1024).mean == pytest.approx(0.3 + 0.2 * items / 4, rel=0.06)
    again = WorkflowModel.from_document(workflow(items), model.to_document())
    assert mean_s(again, 2) == mean_s(model, 2)


def test_costs_and_plans_follow() -> None:
    few, many = (WorkflowModel(workflow(items)).fit(table(24)) for items in (24, 96))
    option = {"resize": Option(4, Size(1, 1024))}
    assert many.predict(option).cost_usd.mean > 3 * few.predict(option).cost_usd.mean
    bound = Latency(5.0, 0.95, 0.9)
    assert make_plan(many, bound)["resize"].workers > make_plan(few, bound)["resize"].workers


def test_without_items_runs_have_as_many_as_were_measured() -> None:
    assert mean_s(WorkflowModel(workflow(None)).fit(table(24)), 2) == pytest.approx(2.7, rel=0.06)
    measured = WorkflowModel(workflow(80), measured_items=True).fit(table(24))
    assert mean_s(measured, 2) == pytest.approx(2.7, rel=0.06)


def test_they_vary_from_run_to_run_as_measured() -> None:
    found = Inputs.of(np.array([8.0, 16.0, 32.0]), np.empty((3, 0)), np.ones(3)).about(48)
    assert found.items.tolist() == [24, 48, 96]
    assert Inputs.of(np.zeros(3), np.empty((3, 0)), np.ones(3)).about(48).items.tolist() == [0], (
        "divisible work has none"
    )
    spread = WorkflowModel(workflow(48)).fit(table(8, 16, 32)).stage_time("resize", workers=1, memory_mb=1024)
    assert spread.quantile(0.9) / spread.quantile(0.1) > 2.5

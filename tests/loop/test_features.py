"""Runs are planned for the size of their input, where the flow declares it."""

from __future__ import annotations

import numpy as np
import pytest

from prefect_slo.loop.knowledge import Fitted, Knowledge
from prefect_slo.loop.planning import Decision, decide
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Latency, Slo
from prefect_slo.workflow import Workflow

MENU = {"workers": [1, 2, 4, 8], "sizes": [{"vcpus": 1, "memory_mb": 1024}], "pools": ["process"]}
WORKFLOW = Workflow.from_document(
    {"name": "resize", "menu": MENU, "stages": [{"name": "resize", "fanout": "given", "items": 16}]}
)
SLO = Slo(latency=Latency(12.0))


@pytest.fixture(scope="module")
def known() -> Knowledge:
    rng = np.random.default_rng(5)
    rows = []
    for run in range(64):
        workers, pages = (1, 2, 4, 8)[run % 4], (2.0, 5.0, 10.0, 20.0)[run // 4 % 4]
        busy = 0.2 * pages * 16 / workers * np.exp(0.03 * rng.standard_normal())
        rows.append((f"r{run}", "resize", workers, 1.0, 1024, busy + 0.4, 0.4, 16, pages))
    names = ("run_id", "stage", "workers", "vcpus", "memory_mb", "wall_s", "overhead_s", "items", "pages")
    table = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return Knowledge("resize", WORKFLOW, Fitted.of(WorkflowModel(WORKFLOW, features=("pages",)).fit(table)))


def decided(known: Knowledge, **features: float) -> Decision:
    rng = np.random.default_rng(0)
    return decide(known, SLO, mode="enforce", seed=0, explore=0, rng=rng, features=features)


@pytest.mark.parametrize(("pages", "workers"), [(2.0, 1), (5.0, 2), (10.0, 4), (20.0, 8)])
def test_a_larger_input_gets_more_workers(known: Knowledge, pages: float, workers: int) -> None:
    plan = decided(known, pages=pages).plan
    assert plan is not None
    assert plan["resize"].workers == workers
    assert plan.predicted is not None
    assert plan.predicted.latency_at_percentile_s <= 12.0


def test_runs_of_about_the_same_size_share_a_plan(known: Knowledge) -> None:
    assert decided(known, pages=10.0).plan is decided(known, pages=10.2).plan


def test_without_a_size_the_plan_covers_every_input(known: Knowledge) -> None:
    plan = decided(known).plan
    assert plan is not None
    assert plan["resize"].workers == 8

"""Runs that the tests of this folder publish, and a fit that is quick and depends on every row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.telemetry import RunRecord, StageKey, StageRecord
from prefect_slo.workflow import Workflow


@pytest.fixture
def make_run() -> Callable[..., RunRecord]:
    """A completed run of a chain of tasks."""

    def make(
        flow: str,
        number: int,
        tasks: tuple[str, ...] = ("load", "train"),
        *,
        workers: int = 2,
        version: str = "",
        **changes,
    ):
        run_id, started = f"{flow}-{number}", 1_760_000_000.0 + 60 * number
        stages = tuple(
            StageRecord(
                StageRun(run_id, task, workers, 1024, 1.0, 1.0 + 0.37 * number, items=8, started_at=started),
                StageKey(task, version or flow),  # flows share code only where a test says so
            )
            for task in tasks
        )
        documents = [{"name": t, "after": list(tasks[max(0, i - 1) : i])} for i, t in enumerate(tasks)]
        fields = {
            "status": "completed", "latency_s": 4.0 + number, "started_at": started, "stages": stages,
            "workflow": {"name": flow, "stages": documents},
        }  # fmt: skip
        return RunRecord(flow, run_id, **{**fields, **changes})

    return make


@pytest.fixture
def fit_sums() -> Callable[..., Mapping[str, object]]:
    """Fits by adding up: any row that is missing, doubled or out of place changes the document."""

    def fit(workflow: Workflow, rows: StageRuns, run_latency_s: Mapping[str, float]) -> Mapping[str, object]:
        walls = [[row.run_id, row.stage, row.workers, row.wall_s] for row in rows.rows()]
        return {"stages": list(workflow.order), "walls": walls, "latency_s": sorted(run_latency_s.items())}

    return fit

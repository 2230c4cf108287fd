"""Runs and rows that the tests of this folder build on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prefect_slo.observation import Invocation, StageRun
from prefect_slo.telemetry import RunRecord, StageKey, StageRecord


@pytest.fixture
def invocation() -> Invocation:
    return Invocation(
        "train", 3, 10, 12.5, queue_s=0.25, compute_s=1.5, read_s=0.125, peak_memory_mb=210.0, bytes_in=512, cold=True
    )


@pytest.fixture
def make_run() -> Callable[..., RunRecord]:
    """A completed run of a two-stage flow; keyword arguments replace fields of the record."""

    def make(number: int, *, workers: int = 2, wall_s: float = 1.0, source_hash: str = "v1", **changes) -> RunRecord:
        run_id = changes.pop("run_id", f"run-{number:04d}")
        started = 1_760_000_000.0 + 60 * number
        stages = tuple(
            StageRecord(
                StageRun(
                    run_id, stage, workers, 1024, 1.0, wall_s, overhead_s=0.1, read_s=0.05, compute_s=0.8, write_s=0.05,
                    items=8, cost_usd=1e-5, peak_memory_mb=120.0, started_at=started,
                ),
                StageKey(stage, source_hash),
            )
            for stage in ("load", "train")
        )  # fmt: skip
        workflow = {"name": "demo", "stages": [{"name": "load"}, {"name": "train", "after": ["load"]}]}
        fields = {
            "flow": "demo", "run_id": run_id, "status": "completed", "latency_s": 2.1 * wall_s, "started_at": started,
            "stages": stages, "workflow": workflow,
        }  # fmt: skip
        return RunRecord(**{**fields, **changes})

    return make

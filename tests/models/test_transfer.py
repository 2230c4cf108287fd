"""Moving bytes between processes is a part of their time that threads don't have."""

from __future__ import annotations

import numpy as np
import pytest

from prefect_slo.models import WorkflowModel
from prefect_slo.models.transfer import THREAD, transfer_share
from prefect_slo.objective import Latency
from prefect_slo.planner import make_plan
from prefect_slo.resources import Menu, Option, Pool, Size
from prefect_slo.workflow import Stage, Workflow

BOTH = Menu(
    workers=(1, 2, 4),
    sizes=(Size(1, 1024),),
    pools=(Pool("process"), Pool("thread", (Size(1, 1024, hardware=THREAD),))),
)
WORKFLOW = Workflow("bytes", (Stage("a", menu=BOTH, fanout="given", items=8),))
ON_THREADS = Option(2, Size(1, 1024, hardware=THREAD), "thread")


def rows(
    *, megabytes: float, item_s: float, hardware: str = "cpu", wall_s: float | None = None
) -> dict[str, list[object]]:
    """Eight items on 1, 2 and 4 workers, four runs each; a megabyte takes 4 ms to read."""
    rng = np.random.default_rng(0)
    columns: dict[str, list[object]] = {}
    for run, workers in enumerate([d for _ in range(4) for d in (1, 2, 4)]):
        noise = float(rng.lognormal(0, 0.03))
        read, compute = 0.004 * megabytes * 8 / workers * noise, item_s * 8 / workers * noise
        wall = wall_s * noise if wall_s is not None else read + compute + 0.02
        row = {
            "run_id": f"{hardware}{run}", "stage": "a", "workers": workers, "vcpus": 1.0, "memory_mb": 1024,
            "hardware": hardware, "items": 8, "bytes_in": 8e6 * megabytes, "wall_s": wall, "overhead_s": 0.02,
            "read_s": read, "compute_s": compute, "write_s": 0.0,
        }  # fmt: skip
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def test_a_stage_never_run_on_threads_is_predicted_there_without_its_transfer() -> None:
    model = WorkflowModel(WORKFLOW).fit(rows(megabytes=100, item_s=0.05))
    assert transfer_share(model.history("a")) == pytest.approx(0.4 / 0.45, rel=0.02)
    assert model.predict({"a": ON_THREADS}).latency_s.p50 == pytest.approx(8 * 0.05, rel=0.1)


def test_big_arguments_are_planned_on_threads_and_small_ones_on_processes() -> None:
    big = make_plan(WorkflowModel(WORKFLOW).fit(rows(megabytes=100, item_s=0.05)), Latency(30.0))
    assert big["a"].pool == "thread"
    small = WorkflowModel(WORKFLOW).fit(rows(megabytes=0.1, item_s=0.5))
    quick = make_plan(small, Latency(2.0))
    assert quick["a"].pool == "process"
    assert quick["a"].workers == 4


def test_what_was_measured_on_threads_goes_before_what_was_guessed() -> None:
    processes, threads = rows(megabytes=1, item_s=0.5), rows(megabytes=0, item_s=0.5, hardware=THREAD, wall_s=1.0)
    model = WorkflowModel(WORKFLOW).fit({name: processes[name] + threads[name] for name in processes})
    assert model.predict({"a": ON_THREADS}).latency_s.p50 == pytest.approx(1.0, rel=0.1)


def test_rows_without_steps_say_nothing_of_threads() -> None:
    table = {k: v for k, v in rows(megabytes=1, item_s=0.5).items() if k not in ("read_s", "compute_s", "write_s")}
    model = WorkflowModel(WORKFLOW).fit(table)
    assert np.isnan(transfer_share(model.history("a")))
    plan = make_plan(model, Latency(30.0))
    assert plan["a"].pool == "process"

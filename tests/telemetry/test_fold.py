from __future__ import annotations

import math
from dataclasses import replace

import pytest

from prefect_slo.errors import InvalidObservation
from prefect_slo.observation import Invocation
from prefect_slo.resources import Size
from prefect_slo.telemetry.fold import fold, summarise

SIZE = Size(2, 2048, hardware="gpu")


def test_a_stage_run_averages_busy_time_over_its_workers():
    invocations = [
        Invocation("s", 0, 4, 0.0, read_s=0.1, compute_s=1.0, write_s=0.1, peak_memory_mb=100, bytes_in=10, cold=True),
        Invocation("s", 0, 4, 1.2, read_s=0.1, compute_s=1.0, write_s=0.1, peak_memory_mb=150, bytes_in=10),
        Invocation("s", 1, 2, 0.0, compute_s=0.6, peak_memory_mb=90, bytes_out=7),
    ]
    run = summarise(invocations, run_id="r", workers=2, size=SIZE, wall_s=3.0, cost_usd=0.01)
    assert (run.read_s, run.compute_s, run.write_s) == pytest.approx((0.1, 1.3, 0.1))
    assert run.overhead_s == pytest.approx(3.0 - 1.5)
    assert (run.items, run.bytes_in, run.bytes_out, run.peak_memory_mb, run.cold) == (10, 20.0, 7.0, 150, True)
    assert (run.vcpus, run.memory_mb, run.hardware) == (2, 2048, "gpu")


@pytest.mark.parametrize("invocations", [[], [Invocation("a", 0, 1, 0.0), Invocation("b", 0, 1, 0.0)]])
def test_a_stage_run_is_of_one_stage(invocations):
    with pytest.raises(InvalidObservation, match="exactly one stage"):
        summarise(invocations, run_id="r", workers=1, size=SIZE, wall_s=1.0)


@pytest.mark.parametrize("status", ["failed", "crashed", "cancelled", "timed_out", "cached"])
def test_what_did_not_complete_never_trains(make_run, status):
    whole = make_run(1)
    one_stage = replace(whole, run_id="r2", stages=(replace(whole.stages[0], status=status), whole.stages[1]))
    folded = fold([one_stage, replace(make_run(3), status="failed")])
    assert list(folded.stage_runs["stage"]) == ["train"]
    assert list(folded.run_latency_s) == ["r2"]


def test_knobs_and_features_become_columns(make_run):
    record = make_run(1)
    stages = (replace(record.stages[0], knobs={"resolution": 720}, features={"frames": 9}), record.stages[1])
    folded = fold([replace(record, stages=stages, latency_s=math.nan)])
    assert folded.stage_runs.extra["resolution"].tolist() == [720, None]
    assert folded.stage_runs.extra["frames"].tolist() == [9, None]
    assert folded.run_latency_s == {}


def test_rows_from_elsewhere_train_stages_but_say_nothing_about_latency(make_run):
    folded = fold([make_run(1, source="flow:other")])
    assert len(folded.stage_runs) == 2
    assert folded.run_latency_s == {}

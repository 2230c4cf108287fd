from __future__ import annotations

import math
from dataclasses import replace

import pytest

from prefect_slo.telemetry.fold import fold


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

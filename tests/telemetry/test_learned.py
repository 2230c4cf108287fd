from __future__ import annotations

from dataclasses import replace

import pytest

from prefect_slo.telemetry.learned import coverage, measured, observations_of, training_rows, workflow_of
from prefect_slo.telemetry.ledger import Ledger


def without(record, stage):
    return replace(record, stages=tuple(s for s in record.stages if s.row.stage != stage))


def renamed(record, before, after, **changes):
    stages = tuple(replace(s, row=replace(s.row, stage=after)) if s.row.stage == before else s for s in record.stages)
    return replace(record, stages=stages, **changes)


def test_a_branch_gets_the_share_of_runs_that_took_it_as_its_probability(make_run):
    runs = [make_run(n) if n % 4 else without(make_run(n), "train") for n in range(8)]
    workflow = workflow_of(Ledger().absorb(runs), "demo")
    assert workflow["train"].probability == 0.75
    assert workflow["load"].probability == 1.0
    assert workflow["train"].parents == ("load",)
    assert workflow["load"].items == 8


def test_there_is_no_workflow_before_a_run_completes(make_run):
    assert workflow_of(Ledger().absorb([make_run(1, status="failed")]), "demo") is None


def test_stages_that_no_kept_run_ran_leave_the_workflow(make_run):
    old = make_run(1)
    new = renamed(make_run(2), "train", "fit")
    new = replace(new, workflow={"name": "demo", "stages": [{"name": "load"}, {"name": "fit", "after": ["load"]}]})
    assert workflow_of(Ledger().absorb([old, new]), "demo").order == ("load", "fit", "train")
    assert workflow_of(Ledger().absorb([replace(old, status="failed"), new]), "demo").order == ("load", "fit")


def test_observations_are_the_rows_of_the_newest_code_and_the_latencies_of_completed_runs(make_run):
    runs = [
        make_run(1, source_hash="v1"),
        make_run(2, source_hash="v2"),
        make_run(3, source_hash="v2", status="failed"),
    ]
    ledger = Ledger().absorb(runs)
    observations = observations_of(ledger, workflow_of(ledger, "demo"))
    assert list(observations.stage_runs["run_id"]) == ["run-0002", "run-0002"]
    assert {key.source_hash for key in observations.keys} == {"v2"}
    assert observations.run_latency_s == pytest.approx({"run-0002": 2.1})


def test_runs_that_lack_the_row_of_a_stage_say_nothing_about_latency(make_run):
    ledger = Ledger(row_budget=6).absorb(make_run(n) for n in range(9))
    observations = observations_of(ledger, workflow_of(ledger, "demo"))
    assert sorted(observations.run_latency_s) == ["run-0006", "run-0007", "run-0008"]
    cached = replace(make_run(20), stages=(make_run(20).stages[0], replace(make_run(20).stages[1], status="cached")))
    ledger = Ledger().absorb([make_run(1), cached])
    assert list(observations_of(ledger, workflow_of(ledger, "demo")).run_latency_s) == ["run-0001"]


def test_a_stage_that_was_renamed_by_a_new_parent_keeps_its_rows(make_run):
    old = [replace(make_run(n, workers=n + 1), status="completed") for n in range(5)]
    stages = [{"name": "load"}, {"name": "clean", "after": ["load"]}, {"name": "train-2", "after": ["clean"]}]
    new = [
        renamed(make_run(n), "train", "train-2", workflow={"name": "demo", "stages": stages}) for n in range(300, 301)
    ]
    ledger = Ledger().absorb([*(replace(run, source="flow:before") for run in old), *new])
    known = coverage(ledger, workflow_of(ledger, "demo"))
    assert (known["train-2"].rows, known["train-2"].settings, known["train-2"].borrowed) == (6, 5, 5)
    assert {row.row.stage for row in training_rows(ledger, "train-2", workflow_of(ledger, "demo"))} == {"train-2"}
    rows = observations_of(ledger, workflow_of(ledger, "demo")).stage_runs.of_stage("train-2")
    assert sorted(rows["run_id"]) == [*(f"run-{n:04d}@train" for n in range(5)), "run-0300"]


def test_a_task_used_a_second_time_learns_from_its_first_place_until_it_has_settings_of_its_own(make_run):
    runs = [make_run(n, workers=n + 1) for n in range(6)]
    stages = [{"name": "load"}, {"name": "train", "after": ["load"]}, {"name": "train-2", "after": ["train"]}]

    def again(n, workers):
        record = make_run(n, workers=workers, workflow={"name": "demo", "stages": stages})
        second = replace(record.stages[1], row=replace(record.stages[1].row, stage="train-2"))
        return replace(record, stages=(*record.stages, second))

    few = Ledger().absorb([*runs, again(50, 3)])
    assert coverage(few, workflow_of(few, "demo"))["train-2"].settings == 6
    many = few.absorb(again(60 + n, n + 10) for n in range(4))
    assert coverage(many, workflow_of(many, "demo"))["train-2"].borrowed == 0


def test_measured_gives_sums_by_setting(make_run):
    ledger = Ledger().absorb([make_run(n) for n in range(3)])
    ((setting, known),) = measured(ledger, "train").items()
    assert (setting.workers, known.moments.rows) == (2, 3)
    assert measured(ledger, "nothing") == {}

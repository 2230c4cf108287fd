"""``plan`` and ``diff`` on files."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_slo.plan import Plan


def test_a_plan_keeps_its_bound_and_is_written_as_its_json_says(run, source, folder: Path) -> None:
    result = run("plan", *source, "--latency", "6s", "-o", folder / "plan.json", "--json")
    assert result.code == 0
    timing = result.document["timing"]
    assert set(timing) == {"fit_s", "solve_s"}
    assert all(seconds > 0 for seconds in timing.values())
    plan = Plan.from_json((folder / "plan.json").read_text())
    assert "timing" not in (folder / "plan.json").read_text()
    assert plan.to_document() == {name: entry for name, entry in result.document.items() if name != "timing"}
    assert plan.predicted is not None
    assert plan.predicted.latency_s.p95 <= 6.0
    assert list(plan.stages) == ["split", "count", "join"]


def test_the_same_input_and_seed_give_the_same_bytes(run, source, folder: Path, plan_file: Path) -> None:
    run("plan", *source, "--latency", "6s", "-o", folder / "again.json")
    assert (folder / "again.json").read_bytes() == plan_file.read_bytes()


def test_a_table_tells_people_what_was_chosen(run, source) -> None:
    result = run("plan", *source, "--latency", "6s")
    assert result.code == 0
    assert "Plan of letters for p95 latency <= 6 s" in result.out
    assert all(stage in result.out for stage in ("split", "count", "join"))
    assert "Certified: under the model, with 99 % confidence" in result.out


def test_a_budget_gives_the_fastest_plan_that_keeps_it(run, source) -> None:
    cheap = run("plan", *source, "--budget", "$0.0002", "--json").document
    dear = run("plan", *source, "--budget", "$0.001", "--json").document
    assert cheap["predicted"]["cost_usd"]["p95"] <= 0.0002
    assert dear["predicted"]["latency_s"]["p95"] < cheap["predicted"]["latency_s"]["p95"]


def test_both_bounds_are_kept_together(run, source) -> None:
    alone = run("plan", *source, "--latency", "6s", "--json").document["predicted"]["cost_usd"]["p95"]
    both = run("plan", *source, "--latency", "6s", "--budget", 1.2 * alone, "--json").document
    assert both["objective"]["latency_s"] == 6.0
    assert both["objective"]["budget_usd"] == pytest.approx(1.2 * alone)
    assert both["predicted"]["cost_usd"]["p95"] <= 1.2 * alone
    assert both["predicted"]["latency_s"]["p95"] <= 6.0
    assert run("plan", *source, "--latency", "6s", "--budget", 0.5 * alone).code == 2


def test_what_no_plan_can_keep_exits_with_2_and_says_what_can_be_kept(run, source) -> None:
    result = run("plan", *source, "--latency", "1s", "--json")
    assert result.code == 2
    answer = result.document
    assert answer["feasible"] is False
    assert answer["bottleneck"] in ("split", "count", "join")
    assert run("plan", *source, "--latency", answer["nearest"]["bound"]).code == 0
    told = run("plan", *source, "--latency", "1s")
    assert told.code == 2
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert "p95 latency <= 1 s cannot be met" in told.err


def test_a_pin_is_kept(run, source) -> None:
    free = run("plan", *source, "--latency", "6s", "--json").document
    pinned = run("plan", *source, "--latency", "6s", "--pin", "count.workers=4", "--json").document
    assert free["stages"]["count"]["workers"] != 4
    assert pinned["stages"]["count"]["workers"] == 4


def test_two_plans_are_told_apart_stage_by_stage(run, source, folder: Path, plan_file: Path) -> None:
    run("plan", *source, "--latency", "5s", "-o", folder / "fast.json")
    result = run("diff", plan_file, folder / "fast.json", "--json")
    assert result.code == 0
    assert result.document["same"] is False
    assert {change["stage"] for change in result.document["changes"]} <= {"split", "count", "join"}
    moved = result.document["predicted"]["latency_s"]
    assert moved["after"] < moved["before"]
    assert "latency p95: " in run("diff", plan_file, folder / "fast.json").out
    assert run("diff", plan_file, plan_file, "--json").document["same"] is True
    assert "the same" in run("diff", plan_file, plan_file).out


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_tables_of_other_kinds_give_the_same_plan(run, source, folder: Path, plan_file: Path, kind: str) -> None:
    import pandas as pd

    table = pd.read_csv(folder / "runs.csv")
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        table.to_parquet(folder / "runs.parquet")
    else:
        table.to_json(folder / "runs.jsonl", orient="records", lines=True)
    other = ["--workflow", folder / "workflow.toml", "--runs", folder / f"runs.{kind}"]
    assert run("plan", *other, "--latency", "6s", "-o", folder / "other.json").code == 0
    assert (folder / "other.json").read_bytes() == plan_file.read_bytes()

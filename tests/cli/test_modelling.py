"""``fit`` and ``evaluate`` on files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd


def test_fit_tells_what_is_known_of_each_stage(run, source) -> None:
    stages = {stage["stage"]: stage for stage in run("fit", *source, "--json").document["stages"]}
    assert stages["count"]["rows"] == 24
    assert stages["count"]["settings"] == 6
    assert all(stage["identified"] for stage in stages.values())
    assert all(stage["error"] < 0.08 for stage in stages.values()), "the noise is 5 %"
    assert "can be planned" in run("fit", *source).out


def test_a_stage_without_rows_is_reported_as_such(run, source, folder: Path) -> None:
    text = (folder / "workflow.toml").read_text() + '[[stages]]\nname = "late"\nafter = ["join"]\n'
    (folder / "workflow.toml").write_text(text)
    late = run("fit", *source, "--json").document["stages"][-1]
    assert (late["stage"], late["rows"], late["identified"], late["error"]) == ("late", 0, False, None)
    refused = run("plan", *source, "--latency", "6s")
    assert refused.code == 1
    assert "stage 'late' has 0 usable observations" in refused.err


def test_a_saved_model_stands_for_its_table(run, source, folder: Path, plan_file: Path) -> None:
    assert run("fit", *source, "-o", folder / "model.json").code == 0
    saved = ["--workflow", folder / "workflow.toml", "--runs", folder / "model.json"]
    assert run("plan", *saved, "--latency", "6s", "-o", folder / "same.json").code == 0
    assert (folder / "same.json").read_bytes() == plan_file.read_bytes()


def test_evaluate_scores_settings_that_were_left_out(run, source) -> None:
    answer = run("evaluate", *source, "--folds", "3", "--json").document
    assert set(answer["stages"]) == {"split", "count", "join"}
    assert all(0.02 < score["busy_error"] < 0.15 for score in answer["stages"].values())
    assert answer["run"]["rows"] == 24
    assert answer["run"]["latency_error"] < 0.1
    assert answer["run"]["cost_error"] is None, "the table has no cost"
    assert "Whole runs (24)" in run("evaluate", *source, "--folds", "3").out


def test_fit_tells_how_many_settings_the_formula_misses(run, source, folder: Path) -> None:
    plain = {stage["stage"]: stage["misfits"] for stage in run("fit", *source, "--json").document["stages"]}
    assert plain == {"split": 0, "count": 0, "join": 0}
    assert "more than four standard errors" not in run("fit", *source).out
    table = pd.read_csv(folder / "runs.csv")
    odd = (table["stage"] == "count") & (table["workers"] == 2) & (table["vcpus"] == table["vcpus"].max())
    table.loc[odd, ["wall_s", "overhead_s"]] *= 2.0
    table.to_csv(folder / "runs.csv", index=False)
    stages = {stage["stage"]: stage["misfits"] for stage in run("fit", *source, "--json").document["stages"]}
    assert stages["count"] >= 1
    assert "more than four standard errors" in run("fit", *source).out

"""``fit`` and ``evaluate`` on files."""

from __future__ import annotations

from pathlib import Path


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

"""``predict`` and ``simulate``: what a plan would do, and what a changed one would."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest


def test_predict_gives_the_distribution_of_the_run_and_its_stages(run, source, plan_file: Path) -> None:
    answer = run("predict", *source, "--plan", plan_file, "--json").document
    latency = answer["latency_s"]
    assert latency["p5"] < latency["p50"] < latency["p95"] < latency["p99"]
    means = [stage["latency_s"]["mean"] for stage in answer["stages"].values()]
    assert sum(means) == pytest.approx(latency["mean"], rel=1e-6), "a chain takes as long as its stages"
    assert sum(s["cost_usd"]["mean"] for s in answer["stages"].values()) == pytest.approx(answer["cost_usd"]["mean"])
    assert answer["kept"] >= 0.95
    assert "of runs keep p95 latency <= 6 s" in run("predict", *source, "--plan", plan_file).out


def test_the_seed_decides_the_sample(run, source, plan_file: Path) -> None:
    def p99(seed: int) -> float:
        return run("predict", *source, "--plan", plan_file, "--seed", seed, "--json").document["latency_s"]["p99"]

    assert p99(1) == p99(1)
    assert p99(1) != p99(2)


def test_simulated_runs_are_written_and_counted_against_the_bound(run, source, folder: Path, plan_file: Path) -> None:
    command = ["simulate", *source, "--plan", plan_file, "--count", "500", "-o", folder / "runs-to-be.csv"]
    answer = run(*command, "--json").document
    rows = pd.read_csv(folder / "runs-to-be.csv")
    assert len(rows) == answer["runs"] == 500
    assert int((rows.latency_s <= 6).sum()) == answer["attainment"]["met"]
    low, high = answer["attainment"]["interval_95"]
    assert low <= answer["attainment"]["share"] <= high
    assert rows.latency_s.to_numpy() == pytest.approx((rows.split_s + rows["count_s"] + rows.join_s).to_numpy())
    assert "500 simulated runs" in run(*command).out


def test_a_change_moves_the_stage_that_it_is_made_to(run, source, plan_file: Path) -> None:
    command = ["simulate", *source, "--plan", plan_file, "--json"]
    before, after = run(*command).document, run(*command, "--set", "count.workers=1", "--set", "count.vcpus=1").document
    assert after["stages"]["count"]["latency_s"]["mean"] > before["stages"]["count"]["latency_s"]["mean"]
    assert after["stages"]["split"] == before["stages"]["split"]
    assert after["attainment"]["share"] < before["attainment"]["share"]


def test_memory_brings_its_vcpus_where_prices_tie_them(run, source, folder: Path, plan_file: Path) -> None:
    text = (folder / "workflow.toml").read_text().replace('"local"', '"aws-lambda-x86"')
    (folder / "workflow.toml").write_text(text)
    command = ["simulate", *source, "--plan", plan_file, "--set", "count.workers=1", "--json"]

    def mean(*change: str) -> float:
        return run(*command, *change).document["stages"]["count"]["latency_s"]["mean"]

    both = mean("--set", "count.memory_mb=3538", "--set", "count.vcpus=2")
    assert mean("--set", "count.memory_mb=3538") == pytest.approx(both, rel=1e-6)
    assert mean("--set", "count.memory_mb=1769") > 1.3 * both


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("count.workers=0", "workers is 0"),
        ("count.workers=many", "'many'"),
        ("count.memory_mb=-1", "memory_mb is -1"),
        ("sort.workers=2", "stage is 'sort'"),
        ("count.height=2", "set is 'count.height'"),
        ("count.workers", "set is 'count.workers'"),
    ],
)
def test_a_change_that_is_none_is_refused(run, source, plan_file: Path, change: str, words: str) -> None:
    answer = run("simulate", *source, "--plan", plan_file, "--set", change)
    assert (answer.code, answer.out, answer.err.count("\n")) == (1, "", 1)
    assert words in answer.err


@pytest.mark.parametrize("command", [["predict", "--samples"], ["simulate", "--count"]])
@pytest.mark.parametrize("number", ["0", "-5", "many"])
def test_no_runs_are_refused(run, source, plan_file: Path, command: list[str], number: str) -> None:
    answer = run(command[0], *source, "--plan", plan_file, command[1], number)
    assert (answer.code, answer.out, answer.err.count("\n")) == (1, "", 1)
    assert number in answer.err
    assert "defect" not in answer.err

"""``explain`` on files."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_explain_tells_where_time_and_money_go_and_what_else_could_be(run, source, plan_file: Path) -> None:
    answer = run("explain", *source, "--plan", plan_file, "--json").document
    stages = answer["stages"]
    assert list(stages) == ["split", "count", "join"]
    assert sum(stage["path_share"] for stage in stages.values()) == pytest.approx(1.0)
    assert sum(stage["cost_share"] for stage in stages.values()) == pytest.approx(1.0)
    assert all(stage["on_longest_path"] == 1.0 for stage in stages.values()), "a chain has one path"
    assert answer["price_of_second_usd"] >= 0
    assert answer["seconds_per_dollar"] is None
    for stage in stages.values():
        assert stage["best"] is None or stage["best"]["keeps_bounds"]


def test_the_words_name_every_stage_and_the_price_of_the_bound(run, source, plan_file: Path) -> None:
    out = run("explain", *source, "--plan", plan_file).out
    assert "A bound looser by 1 % (60 ms) would save about $" in out
    for stage in ("split", "count", "join"):
        assert f"\n{stage}: on the longest path in 100% of runs" in out


def test_a_budget_is_priced_in_seconds(run, source, folder: Path) -> None:
    run("plan", *source, "--budget", "0.0003", "-o", folder / "cheap.json")
    assert (
        "A budget larger by 1 % ($0.00000300) would save about"
        in run("explain", *source, "--plan", folder / "cheap.json").out
    )


def test_a_plan_off_the_menu_is_refused(run, source, plan_file: Path) -> None:
    plan_file.write_text(plan_file.read_text().replace('"memory_mb": 1024', '"memory_mb": 1000'))
    answer = run("explain", *source, "--plan", plan_file)
    assert (answer.code, answer.out, answer.err.count("\n")) == (1, "", 1)
    assert "1000 MB" in answer.err

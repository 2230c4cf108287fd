"""``pareto`` on files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pandas as pd


def test_the_curve_falls_from_the_fastest_plan_to_the_cheapest(run, source, folder: Path) -> None:
    answer = run("pareto", *source, "--points", "8", "-o", folder / "curve.csv", "--json").document
    points = answer["points"]
    assert len(points) >= 3
    for faster, slower in pairwise(points):
        assert faster["latency_s"] < slower["latency_s"]
        assert faster["cost_usd"] > slower["cost_usd"]
    assert all(point["lower_bound_usd"] <= point["cost_usd"] for point in points)
    table = pd.read_csv(folder / "curve.csv")
    assert table.latency_s.tolist() == [point["latency_s"] for point in points]
    assert table["count_workers"].tolist() == [point["stages"]["count"]["workers"] for point in points]


def test_the_table_shows_each_point_and_its_stages(run, source) -> None:
    out = run("pareto", *source, "--points", "4").out
    assert "Cost/latency curve of letters" in out
    assert "1.00" in out, "the cheapest plan is the measure of the others"


def test_a_pin_holds_along_the_curve(run, source) -> None:
    points = run("pareto", *source, "--points", "5", "--pin", "count.workers=2", "--json").document["points"]
    assert {point["stages"]["count"]["workers"] for point in points} == {2}

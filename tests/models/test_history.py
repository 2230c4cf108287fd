"""What a model keeps of its rows, and in which form."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.errors import UnknownStage
from prefect_slo.models.history import History, knob_label, read
from prefect_slo.observation import StageRuns
from prefect_slo.workflow import Stage, Workflow, chain

Build = Callable[..., dict[str, list[object]]]


def _history(settings: list[int], first: int = 0) -> History:
    """One row per entry, at that many workers, each with a wall time of its own."""
    n = len(settings)
    workflow = Workflow("one", (Stage("a"),))
    if n == 0:
        return _history([1]).take(np.zeros(0, dtype=np.int64))
    rows = {
        "run_id": [f"r{first + k}" for k in range(n)],
        "stage": ["a"] * n,
        "workers": settings,
        "vcpus": [1.0] * n,
        "wall_s": [1.0 + 0.001 * (first + k) for k in range(n)],
    }
    return read(workflow, StageRuns.from_table(rows), (), first_run=first)[0]["a"]


def test_upstream_is_the_sum_of_the_parents_workers_in_the_same_run(table: Build, diamond: Workflow) -> None:
    rows = table(diamond)
    histories, _ = read(diamond, StageRuns.from_table(rows), ())
    assert (histories["load"]["upstream"] == 0).all()
    np.testing.assert_array_equal(histories["left"]["upstream"], histories["left"]["workers"])
    np.testing.assert_array_equal(histories["join"]["upstream"], 2 * histories["join"]["workers"])


def test_runs_are_ordered_by_start_where_it_is_known() -> None:
    workflow = Workflow("one", (Stage("a"),))
    rows = {"run_id": ["late", "early"], "stage": ["a", "a"], "workers": [1, 1], "vcpus": [1.0, 1.0],
            "wall_s": [2.0, 1.0], "started_at": [200.0, 100.0]}  # fmt: skip
    histories, numbers = read(workflow, StageRuns.from_table(rows), ())
    assert numbers == {"early": 0, "late": 1}
    assert histories["a"]["wall_s"].tolist() == [1.0, 2.0]


def test_clones_count_once() -> None:
    rows = _history([1, 2, 4])
    later = History(rows.run + 10, rows.numbers, rows.hardware, rows.knobs)
    both = rows.followed_by(later, 100)
    assert len(both) == 3
    assert both.run.tolist() == [10, 11, 12]


def test_surplus_rows_of_the_fullest_setting_go_first() -> None:
    kept = _history([1] * 50 + [2] * 5).followed_by(_history([], 99), 20)
    assert len(kept) == 20
    assert (kept["workers"] == 2).sum() == 5
    assert kept["wall_s"][kept["workers"] == 1].min() == pytest.approx(1.035)


@given(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=60), st.integers(1, 59), st.integers(3, 20))
def test_what_is_kept_does_not_depend_on_how_rows_were_handed_over(settings: list[int], cut: int, limit: int) -> None:
    cut = min(cut, len(settings))
    nothing = _history([], 99)
    at_once = nothing.followed_by(_history(settings), limit)
    in_turn = nothing.followed_by(_history(settings[:cut]), limit).followed_by(_history(settings[cut:], cut), limit)
    np.testing.assert_array_equal(at_once.run, in_turn.run)
    np.testing.assert_array_equal(at_once["wall_s"], in_turn["wall_s"])


@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=20))
def test_a_document_holds_the_very_numbers(walls: list[float]) -> None:
    workflow = Workflow("one", chain("a"))
    rows = {"run_id": [f"r{k}" for k in range(len(walls))], "stage": ["a"] * len(walls), "workers": [1] * len(walls),
            "vcpus": [0.1] * len(walls), "wall_s": walls}  # fmt: skip
    history = read(workflow, StageRuns.from_table(rows), ())[0]["a"]
    again = History.from_document(json.loads(json.dumps(history.to_document())))
    for name, column in history.numbers.items():
        np.testing.assert_array_equal(again[name], column)
    np.testing.assert_allclose(history["wall_s"], walls, rtol=1e-5)


def test_an_unknown_stage_is_named() -> None:
    rows = {"run_id": ["r"], "stage": ["b"], "workers": [1], "vcpus": [1.0], "wall_s": [1.0]}
    with pytest.raises(UnknownStage, match="'b'"):
        read(Workflow("one", (Stage("a"),)), StageRuns.from_table(rows), ())


def test_knob_labels_do_not_depend_on_the_type_of_a_number() -> None:
    assert knob_label([("resolution", 720)]) == knob_label([("resolution", 720.0)]) == "resolution=720"
    assert knob_label([("model", "large"), ("resolution", 480)]) == "model=large,resolution=480"

"""Stage-run tables as typed columns."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.errors import InvalidObservation
from prefect_slo.observation import StageRun, StageRuns

TABLE = {"run_id": ["r1", "r1", "r2"], "stage": ["a", "b", "a"], "workers": [1, 8, 2], "wall_s": [3.0, 2.0, 1.0]}
SIZED = {**TABLE, "memory_mb": [1769, 3538, 1769]}

maybe = st.floats(0, 1e6) | st.just(math.nan)
stage_runs = st.builds(
    StageRun,
    run_id=st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1),
    stage=st.sampled_from(["a", "b"]),
    workers=st.integers(1, 1000),
    memory_mb=st.floats(1, 1e6),
    vcpus=st.floats(0.1, 64),
    wall_s=st.floats(1e-6, 1e6),
    overhead_s=maybe,
    cost_usd=maybe,
    items=st.integers(0, 10**6),
    cold=st.booleans(),
    hardware=st.sampled_from(["cpu", "gpu"]),
    started_at=st.just(math.nan) | st.floats(0, 4e9),
)


@given(st.lists(stage_runs, max_size=8))
def test_rows_come_back_as_they_went_in(rows: list[StageRun]) -> None:
    runs = StageRuns.of(rows)
    assert len(runs) == len(rows)
    assert [str(row) for row in runs.rows()] == [str(row) for row in rows]  # as text, for NaN equals nothing


@given(st.lists(stage_runs, max_size=8), st.lists(stage_runs, max_size=8))
def test_two_tables_together_hold_the_rows_of_both(first: list[StageRun], second: list[StageRun]) -> None:
    both = StageRuns.of(first).concat(StageRuns.of(second))
    assert [str(row) for row in both.rows()] == [str(row) for row in first + second]
    assert len(both.of_stage("a")) + len(both.of_stage("b")) == len(both)


def test_columns_have_the_same_types_full_or_empty() -> None:
    full, empty = StageRuns.from_table(SIZED), StageRuns.of([])
    assert {name: column.dtype for name, column in full.columns.items()} == {
        name: column.dtype for name, column in empty.columns.items()
    }


@pytest.mark.parametrize("as_table", [dict, pd.DataFrame, lambda t: pd.DataFrame(t).convert_dtypes()])
def test_a_mapping_and_pandas_tables_say_the_same(as_table) -> None:  # type: ignore[no-untyped-def]
    assert str(StageRuns.from_table(as_table(SIZED)).rows()) == str(StageRuns.from_table(SIZED).rows())


def test_memory_and_vcpus_follow_from_each_other_where_one_is_missing() -> None:
    assert StageRuns.from_table(SIZED)["vcpus"].tolist() == [1.0, 2.0, 1.0]
    assert StageRuns.from_table({**TABLE, "vcpus": [1, 2, 1]}, mb_per_vcpu=1024)["memory_mb"].tolist() == [
        1024,
        2048,
        1024,
    ]
    mixed = {**TABLE, "vcpus": [1, None, 3], "memory_mb": [None, 1769, 9000]}
    assert StageRuns.from_table(mixed)["vcpus"].tolist() == [1.0, 1.0, 3.0]
    assert StageRuns.from_table(mixed)["memory_mb"].tolist() == [1769.0, 1769.0, 9000.0]


def test_empty_cells_are_the_default_of_their_column() -> None:
    cells = {"items": [4, None, np.nan], "batch": ["", "2", None], "cold": [None, 1, 0], "cost_usd": ["", "0.5", None]}
    runs = StageRuns.from_table({**SIZED, **cells, "hardware": ["gpu", None, ""]})
    assert runs["items"].tolist() == [4, 0, 0]
    assert runs["batch"].tolist() == [1, 2, 1]
    assert runs["cold"].tolist() == [False, True, False]
    assert runs["hardware"].tolist() == ["gpu", "cpu", "cpu"]
    assert np.isnan(runs["cost_usd"]).tolist() == [True, False, True]


@pytest.mark.parametrize("cells", [["true", "False", "yes"], [True, False, True], ["1", "0", "1.0"], [1.0, 0.0, 1]])
def test_truth_may_be_written_in_several_ways(cells: list[object]) -> None:
    assert StageRuns.from_table({**SIZED, "cold": cells})["cold"].tolist() == [True, False, True]


def test_instants_may_be_dates_with_or_without_zone() -> None:
    dates = pd.Series(pd.to_datetime(["2026-01-01", None, "2026-01-01 00:00:00.5"], format="mixed"))
    for column in (dates, dates.dt.tz_localize("UTC"), dates.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")):
        seconds = StageRuns.from_table(pd.DataFrame({**SIZED, "started_at": column}))["started_at"]
        np.testing.assert_array_equal(seconds, [1767225600.0, np.nan, 1767225600.5])


def test_unknown_columns_are_kept_and_selected_with_the_rest() -> None:
    runs = StageRuns.from_table({**SIZED, "epoch": [0, 1, 2], "note": ["x", "y", "z"]})
    assert runs.of_stage("a").extra["epoch"].tolist() == [0, 2]
    assert runs.select(np.array([False, True, False])).extra["note"].tolist() == ["y"]
    assert list(runs.concat(StageRuns.from_table({**SIZED, "epoch": [3, 4, 5]})).extra) == ["epoch"]


def test_an_error_names_column_row_and_value() -> None:
    with pytest.raises(InvalidObservation) as refused:
        StageRuns.from_table({**SIZED, "wall_s": [1.0, -2.0, 3.0]})
    assert (refused.value.field, refused.value.value) == ("wall_s (row 1)", -2.0)


def test_rows_that_cannot_be_measurements_are_refused_too() -> None:
    row = StageRuns.from_table(SIZED).rows()[0]
    with pytest.raises(InvalidObservation, match="wall_s"):
        StageRuns.of([row, replace(row, wall_s=0.0)])
    with pytest.raises(InvalidObservation, match="StageRun"):
        StageRuns.of(["r1"])  # type: ignore[list-item]


def test_a_column_that_is_twice_in_the_table_is_refused() -> None:
    table = pd.DataFrame(SIZED)
    with pytest.raises(InvalidObservation, match="twice"):
        StageRuns.from_table(pd.concat([table, table[["wall_s"]]], axis=1))

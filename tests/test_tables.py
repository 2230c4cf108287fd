from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from prefect_slo.errors import InvalidObservation
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.tables import read_table, to_pandas, write_table


@pytest.fixture
def stage_runs() -> StageRuns:
    rows = [
        StageRun(
            "001", "train", 4, 1792, 1.0, 12.345678901234567, compute_s=math.nan, items=8, cold=True, cost_usd=1e-7
        ),
        StageRun("002", 'a,b "c"', 1, 1024, 0.5, 0.5, compute_s=0.25, hardware="gpu", started_at=1_760_000_000.5),
    ]
    runs = StageRuns.of(rows)
    return StageRuns(runs.columns, {"epoch": np.array([0, 1])})


@pytest.mark.parametrize("name", ["runs.csv", "runs.jsonl", "runs.parquet", "runs.csv.gz", "RUNS.CSV"])
def test_a_table_reads_back_as_it_was_written(stage_runs, tmp_path, name):
    write_table(stage_runs, tmp_path / name)
    again = read_table(tmp_path / name)
    for column in stage_runs.columns:
        np.testing.assert_array_equal(again[column], stage_runs[column], err_msg=column)
    np.testing.assert_array_equal(again.extra["epoch"], [0, 1])


def test_columns_that_say_nothing_are_left_out(stage_runs):
    assert "overhead_s" not in to_pandas(stage_runs)
    assert "compute_s" in to_pandas(stage_runs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("runs.txt", "x", r"ends in \.csv"),
        ("runs", "x", r"ends in \.csv"),
        ("missing.csv", None, "a file that exists"),
        ("empty.csv", "", "at least one row"),
        ("header.csv", "run_id,stage,workers,memory_mb,wall_s\n", "at least one row"),
        ("short.csv", "run_id,stage,workers,memory_mb\n1,a,1,1024\n", "wall_s"),
        ("size.csv", "run_id,stage,workers,wall_s\n1,a,1,2.0\n", "memory_mb or vcpus"),
        ("negative.csv", "run_id,stage,workers,memory_mb,wall_s\n1,a,1,1024,-2\n", r"wall_s \(row 0\)"),
        ("words.csv", "run_id,stage,workers,memory_mb,wall_s\n1,a,1,1024,fast\n", "fast"),
        ("broken.jsonl", "{", r"a readable \.jsonl file"),
        ("broken.parquet", "PAR", r"a readable \.parquet file"),
        ("ragged.csv", "a,b\n1,2,3\n4,5,6,7\n", r"a readable \.csv file"),
    ],
)
def test_what_is_no_table_is_refused_with_the_reason(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InvalidObservation, match=message):
        read_table(tmp_path / name)


def test_a_folder_that_does_not_exist_is_refused(stage_runs, tmp_path):
    with pytest.raises(InvalidObservation, match="can be written"):
        write_table(stage_runs, tmp_path / "none" / "runs.csv")


def test_pandas_is_imported_only_when_a_table_is_read():
    code = "import sys, prefect_slo.tables; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

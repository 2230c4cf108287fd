"""Held-out error and coverage on measured profiles, where a folder of them is given by PREFECT_SLO_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prefect_slo.models import WorkflowModel
from prefect_slo.workflow import Workflow

DATA = Path(os.environ.get("PREFECT_SLO_DATA", ""))
pytestmark = pytest.mark.skipif("PREFECT_SLO_DATA" not in os.environ, reason="set PREFECT_SLO_DATA to a data folder")


@pytest.mark.parametrize(
    ("name", "busy_most", "wall_most"), [("ml-pipeline", 0.056, 0.063), ("video-analytics", 0.026, 0.075)]
)
def test_settings_left_out_are_predicted(name: str, busy_most: float, wall_most: float) -> None:
    workflow = Workflow.load(DATA / name / "workflow.toml")
    table = pd.read_csv(DATA / name / "stage_runs.csv")
    table = table[table["cold"] == 0]
    setting = table["run_id"].str.split("-").str[-1]
    shuffled = np.random.default_rng(0).permutation(sorted(setting.unique()))
    busy, wall, covered = [], [], []
    for fold in range(6):
        out = setting.isin(shuffled[fold::6])
        model = WorkflowModel(workflow).fit(table[~out])
        workers = table[out].pivot_table(index="run_id", columns="stage", values="workers")
        for row in table[out].itertuples():
            upstream = int(sum(workers.loc[row.run_id, parent] for parent in workflow[row.stage].parents))
            at = {"workers": int(row.workers), "memory_mb": row.memory_mb, "upstream": upstream}
            time = model.stage_time(row.stage, **at)
            wall.append(abs(time.quantile(0.5) / row.wall_s - 1))
            covered.append(row.wall_s <= time.quantile(0.95))
            busy.append(abs(model.busy_time(row.stage, **at).quantile(0.5) / (row.wall_s - row.overhead_s) - 1))
    assert np.mean(busy) <= busy_most
    assert np.mean(wall) <= wall_most
    assert 0.915 <= np.mean(covered) <= 0.98

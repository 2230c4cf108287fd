"""A small measured workflow on disk, and a way to run commands in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from prefect_slo.cli import main

WORKFLOW = """
name = "letters"

[menu]
prices = "local"
workers = [1, 2, 4]
sizes = [{vcpus = 1, memory_mb = 1024}, {vcpus = 2, memory_mb = 2048}]

[[stages]]
name = "split"
menu.workers = [1]

[[stages]]
name = "count"
after = ["split"]

[[stages]]
name = "join"
after = ["count"]
menu.workers = [1]
"""


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: object) -> Result:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return command


def measured(seed: int = 0, repeats: int = 4) -> pd.DataFrame:
    """Runs of WORKFLOW at every setting: 1 + 8/(d·v) seconds for ``count``, 5 % noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for workers in (1, 2, 4):
        for vcpus in (1, 2):
            for repeat in range(repeats):
                seconds = {"split": 0.5 + 1 / vcpus, "count": 1 + 8 / (workers * vcpus), "join": 0.4 + 0.2 * workers}
                for stage, mean in seconds.items():
                    wall = mean * float(rng.lognormal(0, 0.05))
                    used = workers if stage == "count" else 1
                    run_id = f"w{workers}-v{vcpus}-{repeat}"
                    rows.append((run_id, stage, used, vcpus, 1024 * vcpus, round(wall, 5), round(0.05 * wall, 5)))
    columns = ["run_id", "stage", "workers", "vcpus", "memory_mb", "wall_s", "overhead_s"]
    return pd.DataFrame(rows, columns=columns)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "workflow.toml").write_text(WORKFLOW)
    measured().to_csv(tmp_path / "runs.csv", index=False)
    return tmp_path


@pytest.fixture
def source(folder: Path) -> list[object]:
    return ["--workflow", folder / "workflow.toml", "--runs", folder / "runs.csv"]


@pytest.fixture
def plan_file(run: Run, source: list[object], folder: Path) -> Path:
    assert run("plan", *source, "--latency", "6s", "-o", folder / "plan.json").code == 0
    return folder / "plan.json"

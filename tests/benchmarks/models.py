"""Held-out error, coverage and fitting time of the stage models on measured profiles.

    python tests/benchmarks/models.py --data DIR [--seeds 5] [--json]

``DIR`` (or ``PREFECT_SLO_DATA``) holds folders with ``workflow.toml`` and ``stage_runs.csv``. Every figure is of warm
runs. Held out: one sixth of the settings in turn, over several shuffles, mean absolute relative error of the median.
Coverage: share of left-out stage runs at or below their predicted P95, with a bootstrap interval over settings. End to
end: fit without one warm epoch, predict its runs: error of the median run and of the P95 against the runs that exceed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prefect_slo.models import WorkflowModel, makespan
from prefect_slo.models.learning import KINDS
from prefect_slo.resources import Option, Size
from prefect_slo.workflow import Workflow

FOLDS = 6


def workflows(data: Path) -> Iterator[tuple[Workflow, pd.DataFrame]]:
    """Every workflow of the folder with its stage runs; a run is named by its epoch and setting."""
    for path in sorted(data.glob("*/workflow.toml")):
        table = pd.read_csv(path.with_name("stage_runs.csv"))
        table["setting"] = table["run_id"].str.split("-").str[-1]
        yield Workflow.load(path), table


def held_out(workflow: Workflow, table: pd.DataFrame, kind: str, seeds: int) -> dict[str, Any]:
    """Errors and coverage at settings left out of the fit."""
    warm = table[table["cold"] == 0]
    settings = np.array(sorted(warm["setting"].unique()))
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        shuffled = np.random.default_rng(seed).permutation(settings)
        for fold in range(FOLDS):
            left_out = warm["setting"].isin(shuffled[fold::FOLDS])
            model = WorkflowModel(workflow, kind=kind).fit(warm[~left_out])
            rows += list(_judged(workflow, model, warm[left_out]))
    frame = pd.DataFrame(rows)
    by_setting = frame.groupby("setting")["covered"].agg(["sum", "count"]).to_numpy(dtype=float)
    rng = np.random.default_rng(0)
    resampled = by_setting[rng.integers(len(by_setting), size=(2000, len(by_setting)))].sum(axis=1)
    low, high = np.quantile(resampled[:, 0] / resampled[:, 1], (0.025, 0.975))
    return {
        "busy_error": frame["busy"].mean(),
        "wall_error": frame["wall"].mean(),
        "coverage": frame["covered"].mean(),
        "coverage_interval": [low, high],
        "wall_error_by_stage": frame.groupby("stage")["wall"].mean().to_dict(),
    }


def _judged(workflow: Workflow, model: WorkflowModel, rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    workers = rows.pivot_table(index="run_id", columns="stage", values="workers")
    for row in rows.to_dict("records"):
        stage = row["stage"]
        at = {
            "workers": int(row["workers"]),
            "memory_mb": row["memory_mb"],
            "upstream": int(sum(workers.loc[row["run_id"], parent] for parent in workflow[stage].parents)),
        }
        wall, busy = model.stage_time(stage, **at), model.busy_time(stage, **at)
        actual = row["wall_s"] - row["overhead_s"]
        yield {
            "stage": stage,
            "setting": row["setting"],
            "wall": abs(wall.quantile(0.5) / row["wall_s"] - 1),
            "busy": abs(busy.quantile(0.5) / actual - 1),
            "covered": row["wall_s"] <= wall.quantile(0.95),
        }


def end_to_end(workflow: Workflow, table: pd.DataFrame, kind: str) -> dict[str, Any]:
    """Latency of whole runs of each warm epoch, predicted from the other epochs."""
    errors, ratios = [], []
    warm = table[table["cold"] == 0]
    for epoch in sorted(warm["epoch"].unique()):
        model = WorkflowModel(workflow, kind=kind).fit(table[table["epoch"] != epoch])
        for _, run in warm[warm["epoch"] == epoch].groupby("run_id"):
            by_stage = run.set_index("stage")
            plan = {
                name: Option(int(row["workers"]), Size(row["memory_mb"] / 1769.0, int(row["memory_mb"])))
                for name, row in by_stage.iterrows()
            }
            actual = float(makespan(workflow, {name: np.array([w]) for name, w in by_stage["wall_s"].items()})[0])
            predicted = model.predict(plan, n_samples=4000).latency_s
            errors.append(predicted.p50 / actual - 1)
            ratios.append(actual / predicted.p95)
    return {
        "p50_error": float(np.mean(np.abs(errors))),
        "p50_error_range": [float(np.min(errors)), float(np.max(errors))],
        "p95_kept": float(np.mean(np.array(ratios) <= 1)),
        "p95_over_actual_p95": float(1 / np.quantile(ratios, 0.95)),
    }


def fitting_time(workflow: Workflow, table: pd.DataFrame) -> float:
    """CPU seconds of one fit of the whole workflow, the least of five."""
    seconds = []
    for _ in range(5):
        start = time.process_time()
        WorkflowModel(workflow).fit(table)
        seconds.append(time.process_time() - start)
    return min(seconds)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("PREFECT_SLO_DATA"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.data is None or not Path(options.data).is_dir():
        print("no data: give --data DIR or set PREFECT_SLO_DATA", file=sys.stderr)
        return 1
    results: dict[str, Any] = {}
    for workflow, table in workflows(Path(options.data)):
        own = results[workflow.name] = {"fit_s": fitting_time(workflow, table)}
        for kind in KINDS:
            own[kind] = {**held_out(workflow, table, kind, options.seeds), **end_to_end(workflow, table, kind)}
    print(json.dumps(results, indent=2) if options.json else _table(results))
    return 0


def _table(results: dict[str, Any]) -> str:
    columns = ("workflow", 16), ("model", 11), ("busy", 8), ("wall", 8), ("P95 coverage (by setting)", 28)
    lines = ["".join(f"{title:{width}}" for title, width in columns) + "run P50 (range)          kept  P95/actual"]
    for name, own in results.items():
        for kind in KINDS:
            r = own[kind]
            low, high = r["coverage_interval"]
            worst = " … ".join(f"{error:+.1%}" for error in r["p50_error_range"])
            lines.append(
                f"{name:16}{kind:11}{r['busy_error']:7.2%}{r['wall_error']:7.2%}"
                f"  {r['coverage']:.3f} [{low:.3f}, {high:.3f}]{'':6}{r['p50_error']:7.2%} ({worst})"
                f"{r['p95_kept']:7.3f}{r['p95_over_actual_p95']:12.3f}"
            )
        lines.append(f"{name:16}fit of the whole workflow: {1000 * own['fit_s']:.0f} ms CPU")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

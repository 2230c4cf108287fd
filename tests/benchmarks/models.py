"""Held-out error, coverage and fitting time of the stage models on measured profiles: ours, and published forms.

    python tests/benchmarks/models.py --data DIR [--seeds 5] [--json]

``DIR`` (or ``PREFECT_SLO_DATA``) holds folders with ``workflow.toml`` and ``stage_runs.csv``. Every figure is of warm
runs. Held out: one sixth of the settings in turn, over several shuffles, mean absolute relative error of the median.
Coverage: share of left-out stage runs at or below their predicted P95, with a bootstrap interval over settings. End to
end: fit without one warm epoch, predict the median and the P95 of its runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prefect_slo.models import WorkflowModel, makespan
from prefect_slo.models.design import Points
from prefect_slo.models.learning import KINDS
from prefect_slo.models.posynomial import fit_posynomial
from prefect_slo.observation import StageRuns
from prefect_slo.resources import Option, Size
from prefect_slo.workflow import Edge, Stage, Workflow

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
    """Latency of whole runs of each warm epoch, predicted from the other epochs.

    P50: predicted median against each run. P95: of the runs of a third of the settings, slow, medium or fast, against
    what their predicted P95 would have to be multiplied by for 95 % of them to keep it.
    """
    errors, ratios, kept_by_third = [], [], []
    warm = table[table["cold"] == 0]
    for epoch in sorted(warm["epoch"].unique()):
        model = WorkflowModel(workflow, kind=kind).fit(table[table["epoch"] != epoch])
        seen = []
        for _, run in warm[warm["epoch"] == epoch].groupby("run_id"):
            by_stage = run.set_index("stage")
            plan = {
                name: Option(int(row["workers"]), Size(row["memory_mb"] / 1769.0, int(row["memory_mb"])))
                for name, row in by_stage.iterrows()
            }
            actual = float(makespan(workflow, {name: np.array([w]) for name, w in by_stage["wall_s"].items()})[0])
            predicted = model.predict(plan, n_samples=20_000).latency_s
            seen.append((actual, predicted.p50 / actual - 1, actual / predicted.p95))
        errors += [error for _, error, _ in seen]
        ratios += [ratio for _, _, ratio in seen]
        kept_by_third.append([[r[2] for r in third] for third in np.array_split(np.array(sorted(seen)), 3)])
    p95_errors = [1 / np.quantile(np.concatenate(third), 0.95) - 1 for third in zip(*kept_by_third, strict=True)]
    return {
        "p50_error": float(np.mean(np.abs(errors))),
        "p50_error_range": [float(np.min(errors)), float(np.max(errors))],
        "p95_error": float(np.mean(np.abs(p95_errors))),
        "p95_error_range": [float(np.min(p95_errors)), float(np.max(p95_errors))],
        "p95_kept": float(np.mean(np.array(ratios) <= 1)),
    }


def fitting_time(stages: int = 8, settings: int = 31, repeats: int = 2) -> dict[str, float]:
    """CPU seconds to fit a synthetic workflow of 8 stages with three steps each, the least of five.

    ``point`` fits the coefficients of every stage, ``all`` chooses the terms, too, and learns noise, corrections and
    the uncertainty of parameters.
    """
    rng = np.random.default_rng(0)
    d, v = (grid.ravel()[:settings] for grid in np.meshgrid([1, 2, 4, 8, 16, 32], [0.5, 1, 2, 3, 4, 6]))
    point, d = Points.of(np.tile(d, repeats).astype(float), np.tile(v, repeats)), np.tile(d, repeats)
    rows, columns = [], ("wall_s", "overhead_s", "read_s", "compute_s", "write_s")
    for k in range(stages):
        steps = np.stack([1 + 2 / d, 1 + 30 / (d * point.vcpus), 0.5 + 1 / d]) * np.exp(
            0.05 * rng.standard_normal(len(d))
        )
        overhead = 0.3 + 0.1 * np.log(d)
        for run, values in enumerate(zip(steps.sum(axis=0) + overhead, overhead, *steps, strict=True)):
            at = {
                "run_id": f"r{run}",
                "stage": f"s{k}",
                "workers": d[run],
                "vcpus": point.vcpus[run],
                "memory_mb": 1024,
            }
            rows.append({**at, **dict(zip(columns, values, strict=True))})
    table = StageRuns.from_table(pd.DataFrame(rows))
    after = [()] + [(Edge(f"s{k - 1}"),) for k in range(1, stages)]
    workflow = Workflow("timing", tuple(Stage(f"s{k}", edges) for k, edges in enumerate(after)))
    of_stage = [table.of_stage(f"s{k}") for k in range(stages)]

    def points() -> None:
        nothing = np.zeros((0, len(d)))
        for one in of_stage:
            busy = one["wall_s"] - one["overhead_s"]
            for step in ("read_s", "compute_s", "write_s"):
                fit_posynomial(point, one[step], busy, np.ones(len(d)), nothing, level="plain")
            fit_posynomial(
                point, one["overhead_s"], one["wall_s"], np.ones(len(d)), nothing, level="plain", overhead=True
            )

    def everything() -> None:
        WorkflowModel(workflow).fit(table)

    return {"point_s": _least_s(points), "all_s": _least_s(everything)}


def reading_time(rows: int = 1_000_000) -> float:
    """CPU seconds to check, read and fit a table of a million rows."""
    rng = np.random.default_rng(0)
    d = rng.choice([1, 2, 4, 8], rows)
    table = pd.DataFrame(
        {
            "run_id": np.char.add("r", (np.arange(rows) // 2).astype(str)),
            "stage": np.where(np.arange(rows) % 2, "b", "a"),
            "workers": d, "memory_mb": rng.choice([1769, 3538], rows),
            "wall_s": (1 + 10 / d) * np.exp(0.05 * rng.standard_normal(rows)),
        }
    )  # fmt: skip
    workflow = Workflow("reading", (Stage("a"), Stage("b", (Edge("a"),))))
    return _least_s(lambda: WorkflowModel(workflow).fit(table), 2)


def _least_s(work: Callable[[], object], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        start = time.process_time()
        work()
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
    results: dict[str, Any] = {"timing": {**fitting_time(), "million_rows_s": reading_time()}}
    for workflow, table in workflows(Path(options.data)):
        own = results[workflow.name] = {}
        for kind in KINDS:
            own[kind] = {**held_out(workflow, table, kind, options.seeds), **end_to_end(workflow, table, kind)}
    print(json.dumps(results, indent=2) if options.json else _table(results))
    return 0


def _table(results: dict[str, Any]) -> str:
    timing = results.pop("timing")
    columns = ("workflow", 16), ("model", 11), ("busy", 8), ("wall", 8), ("P95 coverage (by setting)", 27)
    lines = [
        "".join(f"{title:{width}}" for title, width in columns) + f"{'run P50 (range)':28}{'run P95 (range)':28}kept"
    ]
    for name, own in results.items():
        for kind in KINDS:
            r = own[kind]
            low, high = r["coverage_interval"]
            runs = [
                f"{r[f'{q}_error']:7.2%} ({' … '.join(f'{error:+.1%}' for error in r[f'{q}_error_range'])})"
                for q in ("p50", "p95")
            ]
            lines.append(
                f"{name:16}{kind:11}{r['busy_error']:7.2%}{r['wall_error']:7.2%}"
                f"  {r['coverage']:.3f} [{low:.3f}, {high:.3f}]{'':4}{runs[0]:28}{runs[1]:28}{r['p95_kept']:.3f}"
            )
    lines.append(
        f"8 stages × 31 settings × 2: {1000 * timing['point_s']:.0f} ms point fit, "
        f"{1000 * timing['all_s']:.0f} ms all; "
        f"10⁶ rows read and fitted: {timing['million_rows_s']:.1f} s CPU"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""``fit``, ``evaluate`` and ``predict``: what was learned of the stages, how well, and what it says of a plan."""

from __future__ import annotations

import json as json_format
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson, Cold, PlanFile, Seed, Source, read_plan, read_table, write_text
from prefect_slo.cli.output import counting, print_json, print_line, print_table, working

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prefect_slo.models import WorkflowModel

_LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


@app.command
def fit(
    source: Source,
    *,
    output: Annotated[
        Path | None,
        Parameter(name=["--output", "-o"], help="Write the model here; --runs takes it instead of a table."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Learn how long each stage takes at each size, and say whether enough was measured to plan it."""
    model = source.model()
    if output is not None:
        write_text(output, json_format.dumps(model.to_document()) + "\n")
    stages = [_learned(model, stage.name) for stage in model.workflow.stages]
    if json:
        print_json({"workflow": model.workflow.name, "kind": model.kind, "stages": stages})
        return
    print_table(
        [
            {
                "stage": row["stage"],
                "rows": row["rows"],
                "settings": row["settings"],
                "typical error": _percent(row["error"]),
                "can be planned": "yes" if row["identified"] else "no",
                "why": row["reason"],
            }
            for row in stages
        ],
        title=f"Model of {model.workflow.name} ({model.kind})",
    )
    if output is not None:
        print_line(f"Wrote {output}.")


@app.command
def predict(
    source: Source, *, plan: PlanFile, samples: int = 20_000, cold: Cold = False, seed: Seed = 0, json: AsJson = False
) -> None:
    """Distribution of latency and cost of a plan, under the model."""
    import numpy as np

    from prefect_slo.artifacts.text import dollars_text, seconds_text, share_text

    chosen = read_plan(plan)
    model = source.model()
    for name in chosen.stages:
        model.workflow[name]  # a stage that the workflow does not have is a mistake worth a word
    with working("Sampling"):
        predicted = model.predict(chosen, n_samples=samples, seed=seed, cold=cold)
    drawn = predicted.samples
    stages = {
        name: {"latency_s": _summary(drawn.stage_latency_s[name]), "cost_usd": _summary(drawn.stage_cost_usd[name])}
        for name in model.workflow.order
    }
    kept = None
    if chosen.objective is not None:
        within = np.ones(samples, dtype=bool)
        if chosen.objective.latency is not None:
            within &= drawn.latency_s <= chosen.objective.latency.bound_s
        if chosen.objective.budget is not None:
            within &= drawn.cost_usd <= chosen.objective.budget.bound_usd
        kept = float(within.mean())
    if json:
        print_json(
            {
                "workflow": model.workflow.name,
                "latency_s": _summary(drawn.latency_s),
                "cost_usd": _summary(drawn.cost_usd),
                "kept": kept,
                "stages": stages,
                "samples": samples,
                "seed": seed,
            }
        )
        return
    rows = [
        {
            "stage": name,
            "mean": seconds_text(entry["latency_s"]["mean"]),
            "p50": seconds_text(entry["latency_s"]["p50"]),
            "p95": seconds_text(entry["latency_s"]["p95"]),
            "p99": seconds_text(entry["latency_s"]["p99"]),
            "cost (mean)": dollars_text(entry["cost_usd"]["mean"]),
            "cost (p95)": dollars_text(entry["cost_usd"]["p95"]),
        }
        for name, entry in {
            **stages,
            "run": {"latency_s": _summary(drawn.latency_s), "cost_usd": _summary(drawn.cost_usd)},
        }.items()
    ]
    print_table(rows, title=f"Prediction of {plan} over {samples:,} sampled runs")
    if chosen.objective is not None and kept is not None:
        print_line(f"{share_text(kept)} of runs keep {chosen.objective}.")


@app.command
def evaluate(
    source: Source, *, kind: str = "white-box", folds: int = 6, repeats: int = 1, seed: Seed = 0, json: AsJson = False
) -> None:
    """How well the models predict settings that they were not fitted to.

    Args:
        kind: Stage model: white-box, empirical or analytic.
        folds: Parts that the measured settings are divided into; each is left out in turn.
        repeats: Divisions, each at random.
    """
    from prefect_slo.evaluation import evaluate as evaluated
    from prefect_slo.observation import StageRuns
    from prefect_slo.pricing import price_list

    workflow = source.read()
    tie = price_list(workflow.stages[0].menu.prices).mb_per_vcpu
    runs = StageRuns.from_table(read_table(source.runs), **({} if tie is None else {"mb_per_vcpu": tie}))
    with counting("Fitting with settings left out") as progress:
        scores = evaluated(workflow, runs, kind=kind, folds=folds, repeats=repeats, seed=seed, progress=progress)
    if json:
        print_json(
            {
                "workflow": workflow.name,
                "kind": kind,
                "folds": folds,
                "repeats": repeats,
                "seed": seed,
                "stages": {
                    name: {
                        "rows": score.rows,
                        "wall_error": score.latency_error,
                        "busy_error": score.work_error,
                        "p95_coverage": score.coverage,
                    }
                    for name, score in scores.stages.items()
                },
                "run": None
                if scores.run is None
                else {
                    "rows": scores.run.rows,
                    "latency_error": scores.run.latency_error,
                    "cost_error": scores.run.work_error,
                    "p95_coverage": scores.run.coverage,
                },
            }
        )
        return
    print_table(
        [
            {
                "stage": name,
                "rows": score.rows,
                "error of wall time": _percent(score.latency_error),
                "error of busy time": _percent(score.work_error),
                "within the predicted p95": _percent(score.coverage),
            }
            for name, score in scores.stages.items()
        ],
        title=f"{workflow.name} ({kind}): 1/{folds} of the settings left out, in turn",
    )
    if scores.run is not None:
        print_line(
            f"Whole runs ({scores.run.rows}): latency {_percent(scores.run.latency_error)} off, cost "
            f"{_percent(scores.run.work_error)} off; {_percent(scores.run.coverage)} within the predicted p95."
        )


def _learned(model: WorkflowModel, stage: str) -> dict[str, object]:
    """What a model knows of one stage."""
    from prefect_slo.errors import NotEnoughObservations
    from prefect_slo.evaluation import fitted_error

    verdict = model.identified(stage)
    row: dict[str, object] = {"stage": stage, "rows": 0, "settings": 0, "error": None}
    row |= {"identified": bool(verdict), "reason": verdict.reason}
    try:
        history = model.history(stage)
    except NotEnoughObservations:
        return row
    names = ("workers", "memory_mb", "vcpus", "batch", "upstream")
    settings = len(set(zip(*(history[name].tolist() for name in names), strict=True)))
    return {**row, "rows": len(history), "settings": settings, "error": fitted_error(model, stage)}


def _percent(value: object) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, float) and math.isfinite(value) else "–"


def _summary(values: NDArray[np.float64]) -> dict[str, float]:
    import numpy as np

    quantiles = np.quantile(values, _LEVELS).tolist()
    return {"mean": float(values.mean())} | {
        f"p{100 * level:g}": quantile for level, quantile in zip(_LEVELS, quantiles, strict=True)
    }

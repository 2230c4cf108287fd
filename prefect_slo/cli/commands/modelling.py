"""``fit`` and ``evaluate``: what was learned of the stages, and how well."""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson, Seed, Source, write_text
from prefect_slo.cli.output import counting, print_json, print_line, print_table

if TYPE_CHECKING:
    from prefect_slo.models import WorkflowModel


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
                "misfits": "–" if row["misfits"] is None else row["misfits"],
                "can be planned": "yes" if row["identified"] else "no",
                "why": row["reason"],
            }
            for row in stages
        ],
        title=f"Model of {model.workflow.name} ({model.kind})",
    )
    if any(row["misfits"] for row in stages):
        print_line(
            "Misfits: settings that the formula misses by more than four standard errors, and are corrected for."
        )
    if output is not None:
        print_line(f"Wrote {output}.")


@app.command
def evaluate(
    source: Source, *, kind: str = "white-box", folds: int = 6, repeats: int = 1, seed: Seed = 0, json: AsJson = False
) -> None:
    """How well the models predict settings that they were not fitted to.

    Args:
        kind: Stage model: white-box, empirical, analytic or regression.
        folds: Parts that the measured settings are divided into; each is left out in turn.
        repeats: Divisions, each at random.
    """
    from prefect_slo.evaluation import evaluate as evaluated

    workflow = source.read()
    runs = source.rows(workflow)
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
    row: dict[str, object] = {"stage": stage, "rows": 0, "settings": 0, "error": None, "misfits": None}
    row |= {"identified": bool(verdict), "reason": verdict.reason}
    try:
        history = model.history(stage)
    except NotEnoughObservations:
        return row
    names = ("workers", "memory_mb", "vcpus", "batch", "upstream")
    settings = len(set(zip(*(history[name].tolist() for name in names), strict=True)))
    return {
        **row,
        "rows": len(history),
        "settings": settings,
        "error": fitted_error(model, stage),
        "misfits": _misfits(model, stage, sorted(set(history.hardware.tolist()))),
    }


def _misfits(model: WorkflowModel, stage: str, hardware: Iterable[str]) -> int | None:
    """Settings of a stage, on all hardware, that its formula misses; ``None`` of models without one to correct."""
    from prefect_slo.models.whitebox import WhiteBox

    fitted = [model.stage_model(stage, hardware=kind) for kind in hardware]
    white = [each for each in fitted if isinstance(each, WhiteBox)]
    return sum(int(each.misfits().sum()) for each in white) if white else None


def _percent(value: object) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, float) and math.isfinite(value) else "–"

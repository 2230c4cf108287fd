"""``pareto``: what each second costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson, Cold, Pins, Seed, Source, read_pins, write_text
from prefect_slo.cli.output import print_json, print_line, print_table, working

if TYPE_CHECKING:
    from prefect_slo.plan import StagePlan
    from prefect_slo.planner.pareto import ParetoPoint


@app.command
def pareto(
    source: Source,
    *,
    points: Annotated[int, Parameter(help="Bounds that are tried; plans that coincide are shown once.")] = 20,
    percentile: Annotated[float, Parameter(help="Fraction of runs that keep each latency.")] = 0.95,
    pin: Pins = (),
    cold: Cold = False,
    seed: Seed = 0,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], help="Write the curve here (.csv).")] = None,
    json: AsJson = False,
) -> None:
    """The cost/latency curve: the cheapest plan for each latency, from the fastest to the cheapest. Uncertified."""
    from prefect_slo.artifacts.text import dollars_text, seconds_text
    from prefect_slo.planner.pareto import pareto as front

    pins = read_pins(pin)
    model = source.model()
    model.require_identified()
    with working("Planning along the curve"):
        curve = front(model, points=points, percentile=percentile, seed=seed, cold=cold, pins=pins)
    if output is not None:
        write_text(output, _csv(curve))
    if json:
        print_json(
            {
                "workflow": model.workflow.name,
                "percentile": percentile,
                "seed": seed,
                "points": [
                    {
                        "latency_s": point.latency_s,
                        "cost_usd": point.cost_usd,
                        "lower_bound_usd": point.lower_bound_usd,
                        "stages": _stages(point),
                    }
                    for point in curve
                ],
            }
        )
        return
    cheapest = min((point.cost_usd for point in curve), default=0.0)
    print_table(
        [
            {
                f"p{100 * percentile:g} latency": seconds_text(point.latency_s),
                "mean cost": dollars_text(point.cost_usd),
                "× the cheapest": f"{point.cost_usd / cheapest:.2f}",
                **{name: _short(stage) for name, stage in point.stages.items()},
            }
            for point in curve
        ],
        title=f"Cost/latency curve of {model.workflow.name}",
    )
    if output is not None:
        print_line(f"Wrote {output}.")


def _short(stage: StagePlan) -> str:
    """Workers and what each has, in as few words as a table of all stages takes."""
    gpu = f" + {stage.size.gpu:g} {stage.size.hardware}" if stage.size.gpu else ""
    batch = f", batch {stage.batch}" if stage.batch > 1 else ""
    return f"{stage.workers} × {stage.size.vcpus:.3g} vCPU{gpu}{batch}"


def _stages(point: ParetoPoint) -> object:
    from prefect_slo.plan import Plan

    return Plan("front", None, point.stages).to_document()["stages"]


def _csv(curve: tuple[ParetoPoint, ...]) -> str:
    names = list(curve[0].stages) if curve else []
    header = [
        "latency_s",
        "cost_usd",
        *(f"{name}_{what}" for name in names for what in ("workers", "vcpus", "memory_mb")),
    ]
    rows: list[list[object]] = [[*header]]
    for point in curve:
        chosen = [value for s in point.stages.values() for value in (s.workers, s.size.vcpus, s.size.memory_mb)]
        rows.append([point.latency_s, point.cost_usd, *chosen])
    return "\n".join(",".join(str(cell) for cell in row) for row in rows) + "\n"

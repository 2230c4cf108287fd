"""``predict`` and ``simulate``: what a plan would do, under the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from prefect_slo import units
from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson, Cold, PlanFile, Seed, Source, read_pins, read_plan, write_text
from prefect_slo.cli.output import print_json, print_line, print_table, working
from prefect_slo.errors import InvalidValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prefect_slo.plan import Plan
    from prefect_slo.simulate import Simulation
    from prefect_slo.workflow import Workflow

_SIZE = ("vcpus", "memory_mb", "gpu", "hardware", "gpu_memory_mb")
_REST = ("workers", "pool", "batch")
_LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)

Draws = Annotated[int, Parameter(help="Sampled runs.")]
Changes = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        negative="",
        show_default=False,
        help="What if: train.workers=8, train.memory_mb=2048. May be repeated.",
    ),
]


@app.command
def predict(
    source: Source, *, plan: PlanFile, samples: Draws = 20_000, cold: Cold = False, seed: Seed = 0, json: AsJson = False
) -> None:
    """Distribution of latency and cost of a plan, under the model."""
    chosen = read_plan(plan)
    runs = _simulated(source, chosen, samples, seed, cold)
    kept = None if chosen.objective is None else runs.attainment(chosen.objective).share
    document = {"workflow": chosen.workflow, **_summaries(runs), "kept": kept, "samples": samples, "seed": seed}
    if json:
        print_json(document)
        return
    _print_summaries(document, f"Prediction of {plan} over {samples:,} sampled runs")
    if chosen.objective is not None:
        from prefect_slo.artifacts.text import share_text

        print_line(f"{share_text(runs.attainment(chosen.objective).share)} of runs keep {chosen.objective}.")


@app.command
def simulate(
    source: Source,
    *,
    plan: PlanFile,
    change: Changes = (),
    count: Draws = 1000,
    cold: Cold = False,
    seed: Seed = 0,
    output: Annotated[
        Path | None, Parameter(name=["--output", "-o"], help="Write one row per simulated run here (.csv).")
    ] = None,
    json: AsJson = False,
) -> None:
    """What if: many runs of a plan, with choices changed or not, and how many of them keep its bound."""
    from prefect_slo.artifacts.text import share_text

    chosen = _changed(read_plan(plan), source.read(), read_pins(change, field="set"))
    runs = _simulated(source, chosen, count, seed, cold)
    attainment = None if chosen.objective is None else runs.attainment(chosen.objective)
    low, high = (None, None) if attainment is None else attainment.interval(0.95)
    if output is not None:
        write_text(output, _csv(runs))
    document = {
        "workflow": chosen.workflow,
        "changes": list(change),
        **_summaries(runs),
        "attainment": None
        if attainment is None
        else {
            "objective": str(chosen.objective),
            "met": attainment.met,
            "runs": attainment.runs,
            "share": attainment.share,
            "interval_95": [low, high],
        },
        "runs": count,
        "seed": seed,
    }
    if json:
        print_json(document)
        return
    altered = f" with {', '.join(change)}" if change else ""
    _print_summaries(document, f"{count:,} simulated runs of {plan}{altered}")
    if attainment is not None and low is not None and high is not None:
        print_line(
            f"{attainment.met:,} of {attainment.runs:,} runs keep {chosen.objective}: {share_text(attainment.share)} "
            f"(95 % interval {share_text(low)} to {share_text(high)})."
        )
    if output is not None:
        print_line(f"Wrote {output}.")


def _simulated(source: Source, chosen: Plan, runs: int, seed: int, cold: bool) -> Simulation:
    from prefect_slo.simulate import simulate as simulated

    model = source.model()
    with working("Simulating"):
        return simulated(model, chosen, runs, seed, cold=cold)


def _changed(plan: Plan, workflow: Workflow, changes: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan with some choices replaced; its bound stays.

    Where the price list ties memory and vCPUs, one of them brings the other along.
    """
    for stage, choices in changes.items():
        size = {name: value for name, value in choices.items() if name in _SIZE}
        rest = {name: value for name, value in choices.items() if name in _REST}
        for name in choices:
            if name not in size and name not in rest:
                raise InvalidValue("set", f"{stage}.{name}", f"a choice of {', '.join((*_REST, *_SIZE))}")
        tie = workflow[stage].menu.prices_of(plan[stage].pool).mb_per_vcpu
        if tie is not None and "memory_mb" in size and "vcpus" not in size:
            size["vcpus"] = units.positive(size["memory_mb"], "size.memory_mb") / tie
        elif tie is not None and "vcpus" in size and "memory_mb" not in size:
            size["memory_mb"] = round(units.positive(size["vcpus"], "size.vcpus") * tie)
        plan = plan.with_stage(stage, size=replace(plan[stage].size, **size), **rest)
    return plan


def _summaries(runs: Simulation) -> dict[str, Any]:
    return {
        "latency_s": _summary(runs.latency_s),
        "cost_usd": _summary(runs.cost_usd),
        "stages": {
            name: {"latency_s": _summary(latency), "cost_usd": _summary(runs.stage_cost_usd[name])}
            for name, latency in runs.stage_latency_s.items()
        },
    }


def _summary(values: NDArray[np.floating[Any]]) -> dict[str, float]:
    import numpy as np

    quantiles: Sequence[float] = np.quantile(values, _LEVELS).tolist()
    return {"mean": float(values.mean())} | {
        f"p{100 * level:g}": quantile for level, quantile in zip(_LEVELS, quantiles, strict=True)
    }


def _print_summaries(document: Mapping[str, Any], title: str) -> None:
    from prefect_slo.artifacts.text import dollars_text, seconds_text

    print_table(
        [
            {
                "stage": name,
                **{level: seconds_text(entry["latency_s"][level]) for level in ("mean", "p50", "p95", "p99")},
                "cost (mean)": dollars_text(entry["cost_usd"]["mean"]),
                "cost (p95)": dollars_text(entry["cost_usd"]["p95"]),
            }
            for name, entry in {**document["stages"], "whole run": document}.items()
        ],
        title=title,
    )


def _csv(runs: Simulation) -> str:
    """One row per run: latency, cost, latency of every stage."""
    import io

    import pandas as pd

    columns = {"latency_s": runs.latency_s, "cost_usd": runs.cost_usd}
    columns |= {f"{name}_s": latency for name, latency in runs.stage_latency_s.items()}
    buffer = io.StringIO()
    pd.DataFrame(columns).to_csv(buffer, index_label="run")
    return buffer.getvalue()

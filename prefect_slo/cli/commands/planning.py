"""``plan`` and ``diff``: from a bound to a certified plan, and what changes between two."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson, Bound, Cold, Pins, Seed, Source, read_pins, read_plan, write_text
from prefect_slo.cli.output import print_json, print_line, print_table, working

if TYPE_CHECKING:
    from prefect_slo.plan import Plan

NO_BOUND = Bound()


@app.command
def plan(
    source: Source,
    bound: Bound = NO_BOUND,
    *,
    pin: Pins = (),
    cold: Cold = False,
    seed: Seed = 0,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], help="Write the plan file here.")] = None,
    json: AsJson = False,
) -> None:
    """The best plan that keeps a bound, certified under the model."""
    from prefect_slo.planner import make_plan

    slo, pins = bound.slo(), read_pins(pin)
    started = time.perf_counter()
    model = source.model()
    model.require_identified()
    fitted = time.perf_counter()
    with working(f"Planning for {slo}"):
        made = source.with_passing(make_plan(model, slo, seed=seed, cold=cold, pins=pins))
    solved = time.perf_counter()
    if output is not None:
        write_text(output, made.to_json())
    if json:
        timing = {"fit_s": round(fitted - started, 6), "solve_s": round(solved - fitted, 6)}
        print_json({**made.to_document(), "timing": timing})
        return
    print_plan(made)
    print_line(f"Fitted in {fitted - started:.2f} s, planned in {solved - fitted:.2f} s.")
    if output is not None:
        print_line(f"Wrote {output}.")


@app.command
def diff(
    before: Annotated[Path, Parameter(help="Plan file.")],
    after: Annotated[Path, Parameter(help="Plan file.")],
    /,
    *,
    json: AsJson = False,
) -> None:
    """What changes from one plan to another, and what that does to its prediction."""
    from prefect_slo.artifacts.text import dollars_text, seconds_text
    from prefect_slo.plan import diff as changes_between

    old, new = read_plan(before, field="before"), read_plan(after, field="after")
    changes = changes_between(old, new)
    moved = _moved(old, new)
    if json:
        rows = [
            {"stage": c.stage, "field": c.field, "before": _plain(c.before), "after": _plain(c.after)} for c in changes
        ]
        print_json({"same": not changes, "changes": rows, "predicted": moved})
        return
    if not changes:
        print_line("The stages of both plans are the same.")
    else:
        print_table(
            [
                {"stage": c.stage, "field": c.field, "before": _shown(c.before), "after": _shown(c.after)}
                for c in changes
            ]
        )
    for name, text in (("latency_s", seconds_text), ("cost_usd", dollars_text)):
        if name in moved:
            print_line(f"{name.split('_')[0]} p95: {text(moved[name]['before'])} -> {text(moved[name]['after'])}")


def print_plan(made: Plan) -> None:
    """A plan as tables: its stages, what it predicts, what is certified."""
    from prefect_slo.artifacts.plan_view import certificate_text, passing_table, plan_table, prediction_text

    asked = f" for {made.objective}" if made.objective else ""
    print_table(plan_table(made), title=f"Plan of {made.workflow}{asked}")
    if made.passing:
        print_table(passing_table(made), title="How data pass")
    if made.predicted is not None:
        print_line(f"Predicted: {prediction_text(made.predicted)}")
    print_line(f"Certified: {certificate_text(made)}")


def _moved(old: Plan, new: Plan) -> dict[str, dict[str, float]]:
    if old.predicted is None or new.predicted is None:
        return {}
    return {
        name: {"before": getattr(old.predicted, name).p95, "after": getattr(new.predicted, name).p95}
        for name in ("latency_s", "cost_usd")
    }


def _plain(value: object) -> object:
    """A changed value as JSON holds it; sizes and whole stages in words."""
    return value if value is None or isinstance(value, (str, int, float, list)) else _shown(value)


def _shown(value: object) -> str:
    from prefect_slo.plan import StagePlan

    if value is None:
        return "–"
    return f"{value.workers} × {value.size}" if isinstance(value, StagePlan) else str(value)

"""``profile``, ``import-history``, ``refit`` and ``report``: flows that run with Prefect, measured and learned from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from prefect_slo.artifacts.text import dollars_text, seconds_text
from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson, Seed
from prefect_slo.cli.output import print_json, print_line, print_table, working

if TYPE_CHECKING:
    from prefect_slo.loop.profiling import Measurement, SweepReport
    from prefect_slo.loop.reporting import FlowReport, StageReport
    from prefect_slo.resources import Option

NOT_IDENTIFIED = 1


@app.command
def profile(
    flow: str,
    *,
    param: Annotated[
        tuple[str, ...], Parameter(negative="", show_default=False, help="A parameter: n=100. May be repeated.")
    ] = (),
    params: Annotated[
        Path | None, Parameter(help="A .json file with a list of inputs; runs take them in turn.")
    ] = None,
    max_seconds: float = 600.0,
    max_usd: float | None = None,
    repeats: int = 2,
    most_repeats: int = 6,
    seed: Seed = 0,
    json: AsJson = False,
) -> int:
    """Run a decorated flow at different settings until it can be planned; what was measured before isn't again.

    Ends with exit code 1 where its first run fails or it can't be planned afterwards. Ctrl-C keeps what was measured.

    Args:
        flow: The flow: package.module:flow or path/to/file.py:flow.
        max_seconds: No run is begun that would end later than this.
        max_usd: No run is begun that would cost more than is left of this, at the price list.
        repeats: Runs per setting.
        most_repeats: Runs per setting at most, where they differ by more than 5 %.
    """
    import math

    from prefect_slo.cli.flows import load_flow, read_inputs
    from prefect_slo.cli.steps import steps

    _quiet()
    inputs = read_inputs(param, params)
    with steps() as heard:
        heard("start", 0, 1, "loading the flow")
        loaded = load_flow(flow)
        from prefect_slo.loop.profiling import profile as sweep

        runs: list[Measurement] = []

        def show(run: Measurement) -> None:
            runs.append(run)
            heard("profile", run.number, run.planned, "failed" if run.error else seconds_text(run.latency_s))

        cap = math.inf if max_usd is None else max_usd
        try:
            caps = {"max_seconds": max_seconds, "max_usd": cap}
            report = sweep(loaded, inputs, **caps, repeats=repeats, most_repeats=most_repeats, seed=seed, heard=show)
        except KeyboardInterrupt:
            print(f"{len(runs)} runs are kept; the next profile goes on from there.", file=sys.stderr)
            raise
    if json:
        print_json({"flow": loaded.name, **_sweep_document(report)})
    else:
        _print_sweep(loaded.name, report)
    return NOT_IDENTIFIED if report.runs[0].error or not report.identified else 0


@app.command
def import_history(
    flow_name: str,
    *,
    limit: int = 50,
    hardware: str | None = None,
    vcpus: float = 1.0,
    memory_mb: int = 1024,
    json: AsJson = False,
) -> None:
    """Learn from the timings of runs that Prefect has recorded, of decorated flows or not, with no re-run.

    Args:
        flow_name: Name of the flow.
        limit: Newest completed runs to read at most.
        hardware: What its workers ran on, which Prefect doesn't record: thread for the default task runner, cpu for
            processes, or a name of the menu. Without it the rows show how long stages take, and no plan comes of them.
        vcpus: vCPUs of each worker.
        memory_mb: Memory of each worker, in MB.
    """
    from prefect_slo.blocks import fold_in
    from prefect_slo.history import import_history as read_history
    from prefect_slo.history.importing import UNKNOWN
    from prefect_slo.loop.reporting import report
    from prefect_slo.telemetry.store import publish, read_runs

    _quiet()
    with working("Reading Prefect's records"):
        found = read_history(flow_name, limit, hardware=hardware or UNKNOWN, vcpus=vcpus, memory_mb=memory_mb)
        stored = {record.run_id for entry in read_runs(flow_name) for record in entry.records}
        fresh = [record for record in found.records if record.run_id not in stored]
        for start in range(0, len(fresh), 50):
            publish(flow_name, fresh[start : start + 50])
        fold_in(flow_name)
        known = report(flow_name)
    if json:
        counts = {"task_runs": found.task_runs, "left_out": found.left_out}
        print_json({"flow": flow_name, "runs": len(found.records), "new": len(fresh), **counts, **_stages(known)})
        return
    size = f"They count as workers of {vcpus:g} vCPU on {hardware!r}."
    if hardware is None:
        size = "What workers ran on isn't recorded: say it by --hardware and --vcpus, or profile the flow for a plan."
    print_line(
        f"Read {len(found.records)} runs of {flow_name} with {found.task_runs} task runs; {len(fresh)} are new, and "
        f"{found.left_out} task runs say nothing about time. {size}"
    )
    _print_stages(known)


@app.command
def refit(
    flow_name: str | None = None,
    *,
    rebuild: bool = False,
    min_change: float | None = None,
    max_change: float | None = None,
    move: Annotated[bool, Parameter(negative="")] = False,
    json: AsJson = False,
) -> None:
    """Fold in what runs have left in the API, fit the models again, and plan again where that pays.

    Args:
        flow_name: Name of the flow; all that were observed by default.
        rebuild: Learn everything anew from the API, instead of adding what is new.
        min_change: A plan that is better by less than this share doesn't replace the one in force.
        max_change: A plan that changes latency, cost or vCPUs by more than this share is proposed, and not adopted.
        move: A plan in force that the machine of the newest run has no room for gives way to one that it has.
    """
    from prefect_slo.errors import UnknownFlow
    from prefect_slo.loop.guard import Guard
    from prefect_slo.loop.learning import refit as learn_again
    from prefect_slo.loop.reporting import report
    from prefect_slo.telemetry.store import observed_flows

    _quiet()
    with working("Fitting"):
        observed = observed_flows()
        if flow_name is not None and flow_name not in observed:
            hint = "Run it once with @slo(...), or import its history."
            raise UnknownFlow(flow_name, hint)
        names = (flow_name,) if flow_name is not None else observed
        guard = Guard.of(min_change, max_change)
        reasons = {name: learn_again(name, rebuild=rebuild, guard=guard, move=move) for name in names}
        known = [report(name) for name in names]
    if json:
        print_json(
            [{"flow": r.flow_name, "revision": r.revision, "plan": reasons[r.flow_name], **_stages(r)} for r in known]
        )
        return
    print_table(
        [
            {
                "flow": r.flow_name,
                "revision": r.revision,
                "runs": r.runs,
                "can be planned": "no" if r.missing else "yes",
                "plan": reasons[r.flow_name],
            }
            for r in known
        ]
        or [{"flow": "none was observed yet"}]
    )


@app.command
def report(flow_name: str, *, json: AsJson = False) -> None:
    """How a flow stands: its bound, the plan in force, how often it was kept, predicted against actual.

    Args:
        flow_name: Name of the flow.
    """
    from prefect_slo.loop.reporting import report as report_of

    _quiet()
    with working("Reading the profile"):
        known = report_of(flow_name)
    if json:
        print_json(known.to_document())
        return
    for line in known.lines():
        print_line(line)
    _print_stages(known)


def _quiet() -> None:
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")


def _sweep_document(report: SweepReport) -> dict[str, Any]:
    return {
        "runs": [
            {
                "settings": {name: _words(option) for name, option in run.settings.items()},
                "latency_s": run.latency_s,
                "cost_usd": run.cost_usd,
                "error": run.error or None,
            }
            for run in report.runs
        ],
        "seconds": report.seconds,
        "cost_usd": report.cost_usd,
        "stopped": report.stopped,
        "identified": report.identified,
        "missing": report.known.missing(),
        "plan": report.known.plan.to_document() if report.known.plan is not None else None,
    }


def _print_sweep(name: str, report: SweepReport) -> None:
    failed = sum(bool(run.error) for run in report.runs)
    print_line(
        f"Profiled {name} in {len(report.runs)} runs ({failed} failed), {seconds_text(report.seconds)}, "
        f"{dollars_text(report.cost_usd)}. It ended because of this: {report.stopped}."
    )
    rows = [
        {
            "run": run.number,
            **{stage: _words(option) for stage, option in run.settings.items()},
            "latency": run.error or seconds_text(run.latency_s),
            "cost": dollars_text(run.cost_usd),
        }
        for run in report.runs
        if run.settings
    ]
    if rows:
        print_table(rows, title="Measured")
    plan = report.known.plan
    if not report.identified:
        print_line(f"It can't be planned yet: {report.known.missing()}.")
    elif plan is not None and plan.predicted is not None:
        print_line(
            f"The plan in force predicts {seconds_text(plan.predicted.latency_s.mean)} on average and "
            f"{seconds_text(plan.predicted.latency_at_percentile_s)} at the percentile."
        )


def _words(option: Option) -> str:
    knobs = "".join(f", {name}={value}" for name, value in option.knobs)
    where = "" if option.pool in ("default", "process") else f" on {option.pool}"
    return f"{option.workers} x {option.size}{where}{knobs}"


def _stages(known: FlowReport) -> dict[str, Any]:
    document = known.to_document()
    return {name: document[name] for name in ("can_be_planned", "missing", "stages")}


def _print_stages(known: FlowReport) -> None:
    print_table([_row(stage) for stage in known.stages] or [{"stage": "none is known"}])


def _row(stage: StageReport) -> dict[str, object]:
    return {
        "stage": stage.name,
        "rows": stage.rows,
        "settings": stage.settings,
        "from elsewhere": stage.borrowed,
        "can be planned": "yes" if stage.identified else "no",
        "plan": _words(stage.plan.option) if stage.plan is not None else "–",
        "predicted": seconds_text(stage.forecast.mean_s) if stage.forecast is not None else "–",
        "actual": f"{seconds_text(stage.actual_s)} ({stage.actual_runs} runs)" if stage.actual_runs else "–",
        "why not": "" if stage.identified else stage.reason,
    }

"""``demo``: the main job on real input, with nothing else needed."""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING

from prefect_slo.artifacts.text import dollars_text, seconds_text
from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson, Seed
from prefect_slo.cli.output import print_json, print_line, print_table
from prefect_slo.cli.steps import steps

if TYPE_CHECKING:
    from prefect_slo.demo_report import DemoReport, Series


@app.command
def demo(*, runs: int = 10, scale: float = 1.0, long: bool = False, seed: Seed = 0, json: AsJson = False) -> None:
    """Profile a real flow, plan it for three deadlines, run it by the plans, and compare with running it otherwise.

    Args:
        runs: Runs per deadline.
        scale: Multiplies the number of images of the flow; the time of every stage grows in proportion.
        long: 20 runs per deadline, 60 in all.
    """
    from prefect_slo.units import positive, whole

    runs = 20 if long else whole(runs, "runs")
    positive(scale, "scale")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    # a new database takes Prefect's server 10 to 15 s on an idle machine; its own limit is 20
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    with steps() as heard:
        heard("start", 0, 1, "starting Prefect's API")
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from prefect_slo.demo import demo as run_demo

        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):  # stopping it takes up to a second a run
            report = run_demo(runs=runs, scale=scale, seed=seed, heard=heard)
    if json:
        print_json(report.to_document())
        return
    _print(report)


def _print(report: DemoReport) -> None:
    print_line(
        f"Profiled ml-pipeline in {report.profiling_runs} runs ({report.profiling_s:.0f} s), planned it for three "
        f"deadlines and ran each plan {len(report.deadlines[0].latency_s)} times."
    )
    if caveat := report.calm.caveat(report.confidence):
        print_line(caveat)
    title = f"Deadlines (P95 at {report.confidence * 100:g} % confidence)"
    print_table([_deadline_row(series) for series in report.deadlines], title=title)
    print_table([_plan_row(series) for series in report.deadlines], title="Plans (workers x vCPU of each)")
    dearest = next(series for series in report.references if series.name == "all-max")
    print_table(
        [_cost_row(series, dearest) for series in (*report.deadlines, *report.references)],
        title="Against running it otherwise",
    )
    low, high = report.pooled.interval()
    print_line(
        f"{report.pooled.met} of {report.pooled.runs} runs kept their deadline "
        f"({report.pooled.share:.1%}; 95 % interval {low:.1%} to {high:.1%})."
    )
    print_line("Prefect's default runner reserves nothing; it is priced as the whole machine while it runs.")
    where = os.environ.get("PREFECT_API_URL")
    print_line(
        "See the runs, the plan and predicted against actual: "
        + (f"{where.removesuffix('/api')} " if where else "run 'prefect server start' and open http://127.0.0.1:4200 ")
        + "(Artifacts: slo-plan-ml-pipeline, slo-graph-ml-pipeline, slo-attainment-ml-pipeline)."
    )
    print_line(f"Took {report.total_s:.0f} s.")
    sys.stdout.flush()


def _deadline_row(series: Series) -> dict[str, object]:
    low, high = series.attainment.interval()
    predicted = series.plan.predicted if series.plan is not None else None
    return {
        "deadline": seconds_text(series.bound_s),
        "kept": f"{series.attainment.met} of {series.attainment.runs}",
        "95 % interval": f"{low:.0%} to {high:.0%}",
        "predicted mean": seconds_text(predicted.latency_s.mean) if predicted else "",
        "actual mean": seconds_text(series.mean_latency_s),
        "predicted P95": seconds_text(predicted.latency_at_percentile_s) if predicted else "",
        "slowest": seconds_text(max(series.latency_s, default=math.nan)),
    }


def _plan_row(series: Series) -> dict[str, object]:
    stages = series.plan.stages if series.plan is not None else {}
    sizes = {name: f"{stage.workers} x {stage.size.vcpus:g}" for name, stage in stages.items()}
    return {"deadline": seconds_text(series.bound_s), **sizes}


def _cost_row(series: Series, dearest: Series) -> dict[str, object]:
    return {
        "run as": series.name,
        "runs": len(series.cost_usd),
        "mean latency": seconds_text(series.mean_latency_s),
        "mean cost": dollars_text(series.mean_cost_usd),
        "of all-max": f"{series.mean_cost_usd / dearest.mean_cost_usd:.0%}",
    }

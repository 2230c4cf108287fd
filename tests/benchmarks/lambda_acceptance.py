"""The ML pipeline on the Lambda backend, in the test bed: profiled, planned for three deadlines, run by the plans.

``python tests/benchmarks/lambda_acceptance.py``; takes about ten minutes on two cores. Sandboxes really have their
memory's share of a vCPU, so that small ones are slow, and four of them fit two cores. Prints how many runs kept their
deadline, what was predicted of them and what they took, and whether bills and results are what they have to be.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")

import numpy as np
from prefect import Flow
from threadpoolctl import threadpool_limits

from prefect_slo.aws.report import bill
from prefect_slo.decorators import director_of, slo
from prefect_slo.demo import listening
from prefect_slo.errors import InfeasibleSlo
from prefect_slo.loop import background
from prefect_slo.loop.director import Following, following
from prefect_slo.loop.profiling import profile
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.planner.deadlines import deadlines
from prefect_slo.pricing import price_list
from prefect_slo.runner.aws_pools import LambdaPool
from prefect_slo.runner.recipe import ObservedRun, Recipe
from prefect_slo.testing.aws import LocalAws, local_aws

SIZES = (256, 384, 512, 640, 768)
WORKERS = (1, 2, 4)
SEEN = ("numpy", "scipy", "sklearn", "joblib", "threadpoolctl", "narwhals")


@dataclass
class Series:
    """Runs under one deadline.

    Attributes:
        bound_s: The deadline.
        plan: Stage, workers and memory of the last plan.
        latency_s: Of each run.
        cost_usd: Of each run.
        p50_s: Predicted for each run by the plan that it followed.
        p95_s: Likewise.
        mean_usd: Likewise.
        infeasible: What was said, where no plan keeps the deadline.
        exact: Runs whose cost is the sum of their bills, to the last digit.
        same: Runs with the result of a local one.
        cold: Runs that met a cold start.
    """

    bound_s: float
    plan: dict[str, str] = field(default_factory=dict)
    latency_s: list[float] = field(default_factory=list)
    cost_usd: list[float] = field(default_factory=list)
    p50_s: list[float] = field(default_factory=list)
    p95_s: list[float] = field(default_factory=list)
    mean_usd: list[float] = field(default_factory=list)
    infeasible: str = ""
    exact: int = 0
    same: int = 0
    cold: int = 0

    @property
    def missed(self) -> int:
        return sum(latency > self.bound_s for latency in self.latency_s)


def accept(
    account: LocalAws,
    pool: LambdaPool,
    stock: Flow[Any, Any],
    parameters: dict[str, Any],
    *,
    runs: int,
    repeats: int,
    bounds: tuple[float, ...] | None = None,
    seed: int = 0,
) -> tuple[int, list[Series]]:
    """Profile, plan and run; returns the runs of the sweep, and a series for each deadline.

    Args:
        account: The mocked account.
        pool: A deployed pool in it.
        stock: The flow, undecorated.
        parameters: Of every run.
        runs: For each deadline.
        repeats: Rows for each setting of the profile.
        bounds: Deadlines; by default one that is just feasible, one that the cheapest plan keeps, and one between.
        seed: Of every draw.
    """
    options: dict[str, Any] = {
        "mode": "enforce", "explore": 0, "seed": seed, "pools": [pool], "menu": {"pools": pool.name},
    }  # fmt: skip
    with threadpool_limits(1):  # as over there: sums of floats depend on how many threads share them
        local = stock(**parameters)
    sized = slo(latency=3600, **options)(stock)
    warm(sized, pool, parameters)
    report = profile(
        sized, [parameters], max_seconds=900, repeats=repeats, seed=seed,
        heard=lambda run: note(f"profile {run.number}/{run.planned}: {run.error or f'{run.latency_s:.2f} s'}"),
    )  # fmt: skip
    assert report.known.model is not None, report.stopped
    found = []
    for bound in bounds or deadlines(report.known.model, seed=seed).bounds_s:
        flow, series = slo(latency=bound, **options)(stock), Series(bound)
        found.append(series)
        seen: list[ObservedRun] = []
        with listening(director_of(flow), seen):
            for number in range(runs):
                before = len(account.lambdas.invocations)
                try:
                    result = flow(**parameters)
                except InfeasibleSlo as error:
                    series.infeasible = str(error)
                    break
                background.settle()
                take(series, seen[-1], account.lambdas.invocations[before:], result == local)
                note(f"deadline {bound:.2f} s, run {number + 1}/{runs}: {series.latency_s[-1]:.2f} s")
    return len(report.runs), found


def warm(flow: Flow[Any, Any], pool: LambdaPool, parameters: dict[str, Any]) -> None:
    """Runs that no figure is taken of, at each size, so that environments are there: plans are made for warm ones."""
    shown: list[ObservedRun] = []
    with following(Following(recipe=Recipe(workers=1), heard=shown.append, mode="reference")):
        flow(**parameters)
    for size in pool.pool.sizes:
        workers = {row.stage: min(row.items, max(pool.workers)) for row in shown[0].stage_runs}
        stages = {name: StagePlan(count, size, pool.name) for name, count in workers.items()}
        with following(Following(Plan(flow.name, None, stages), heard=shown.append, mode="reference")):
            flow(**parameters)
        note(f"warm: {size.memory_mb} MB, {shown[-1].latency_s:.2f} s")


def take(series: Series, run: ObservedRun, done: list[Any], same: bool) -> None:
    """Add a run to its series."""
    plan = run.recipe.plan
    assert plan is not None, "the run followed no plan"
    assert plan.predicted is not None
    series.plan = {name: f"{stage.workers} x {stage.size.memory_mb} MB" for name, stage in plan.stages.items()}
    series.latency_s.append(run.latency_s)
    series.cost_usd.append(run.cost_usd)
    series.p50_s.append(plan.predicted.latency_s.p50)
    series.p95_s.append(plan.predicted.latency_s.p95)
    series.mean_usd.append(plan.predicted.cost_usd.mean)
    prices = price_list("aws-lambda-x86")
    billed = sum((bill(prices, one.memory_mb, one.billed_ms) for one in done), Decimal())
    series.exact += run.cost_usd == float(billed)
    series.same += same
    series.cold += any(one.init_ms for one in done)


def summary(found: list[Series]) -> dict[str, float]:
    """Pooled figures: medians and 95th percentiles of actual over predicted, by run."""
    ran = [series for series in found if series.latency_s]
    latency = np.concatenate([series.latency_s for series in ran])
    p50, p95 = (np.concatenate([getattr(series, name) for series in ran]) for name in ("p50_s", "p95_s"))
    actual, predicted = (sum(sum(getattr(series, name)) for series in ran) for name in ("cost_usd", "mean_usd"))
    return {
        "runs": len(latency),
        "missed": sum(series.missed for series in ran),
        "p50_actual_over_predicted": float(np.median(latency / p50)),
        "p95_actual_over_predicted": float(np.quantile(latency / p95, 0.95)),
        "cost_actual_over_predicted": actual / predicted,
        "cost_exact": sum(series.exact for series in ran),
        "results_same": sum(series.same for series in ran),
    }


def note(words: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}, load {os.getloadavg()[0]:.1f}] {words}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="for each deadline")
    parser.add_argument("--repeats", type=int, default=4, help="rows for each setting of the profile")
    parser.add_argument("--scale", type=float, default=0.2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_LOGGING_LEVEL, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "ml_pipeline"))
    from flow import stock

    begun, load = time.monotonic(), os.getloadavg()[0]
    with ExitStack() as stack:
        os.environ["PREFECT_INTEGRATIONS_SLO_HOME"] = stack.enter_context(tempfile.TemporaryDirectory())
        quiet = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_LOGGING_LEVEL: "WARNING"}
        stack.enter_context(temporary_settings(quiet))
        stack.enter_context(prefect_test_harness(server_startup_timeout=240))
        account = stack.enter_context(local_aws(cpu="shares", packages=SEEN))
        pool = account.pool(
            memory_mb=SIZES, workers=WORKERS, concurrency=max(WORKERS), timeout_s=120,
            environment={"OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        parameters = {"scale": options.scale}
        swept, found = accept(account, pool, stock, parameters, runs=options.runs, repeats=options.repeats)
    took_s = time.monotonic() - begun
    if options.json:
        print(
            json.dumps(
                {"load": load, "seconds": took_s, "sweep": swept, "series": [*map(asdict, found)], **summary(found)}
            )
        )
        return
    print(f"{swept} runs profiled at {len(SIZES)} memory sizes; load {load:.1f} at the start; {took_s:.0f} s in all")
    for series in found:
        if series.infeasible or not series.latency_s:
            print(f"deadline {series.bound_s:.2f} s: infeasible: {series.infeasible}")
            continue
        n = len(series.latency_s)
        print(
            f"deadline {series.bound_s:.2f} s: {n - series.missed} of {n} kept; "
            f"P50 {statistics.median(series.p50_s):.2f} predicted, {statistics.median(series.latency_s):.2f} actual; "
            f"P95 {statistics.median(series.p95_s):.2f} predicted, {np.quantile(series.latency_s, 0.95):.2f} actual; "
            f"${statistics.fmean(series.mean_usd):.3g} predicted, ${statistics.fmean(series.cost_usd):.3g} billed; "
            f"{series.exact} bills exact, {series.same} results the same, {series.cold} cold; {series.plan}"
        )
    if any(series.latency_s for series in found):
        for name, value in summary(found).items():
            print(f"{name}: {value if math.isclose(value, round(value), abs_tol=0) else round(value, 4)}")


if __name__ == "__main__":
    main()

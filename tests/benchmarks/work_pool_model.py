"""Start-up and polling of work pools: what the model predicts of runs, against runs on a real server with real workers.

``python tests/benchmarks/work_pool_model.py [--runs 60] [--calibrate 24] [--poll 1] [--seed 0]``

Four mapped stages, two of them on pool ``cpu`` and two on ``gpu``: process pools of a Prefect server of its own, each
with a worker that polls. A run follows the one before at once or, by chance, after a pause that pilots don't outlast,
so that these are warm for some runs, and asked for, polled for and booted for others. The flow is calibrated on some
runs, gets the tightest deadline that the planner then certifies, and is run by its plan. Compared are the percentiles
that the plan in force predicted before the first of these runs with those of the runs; how many missed is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
for _service in ("TASK_RUN_RECORDER", "EVENT_PERSISTER"):  # one by one they keep SQLite locked
    os.environ.setdefault(f"PREFECT_SERVER_SERVICES_{_service}_BATCH_SIZE", "100")
    os.environ.setdefault(f"PREFECT_SERVER_SERVICES_{_service}_READ_BATCH_SIZE", "100")
os.environ.setdefault("PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL", "1")


ITEMS = 4
IDLE_S, BREATH_S, PAUSE_S = 5.0, 0.2, 7.0
MARGIN = 1.10
MISSES = 6


@dataclass
class Series:
    """Runs of one phase.

    Attributes:
        latency_s: Of each.
        cold: Of each, how many stages waited for a pilot to start.
        start_s: Of each, the sum of these waits.
        cost_usd: Of each.
        predicted: Of each, what the plan that it followed predicts: P50, at the percentile, mean cost.
    """

    latency_s: list[float] = field(default_factory=list)
    cold: list[int] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    cost_usd: list[float] = field(default_factory=list)
    predicted: list[tuple[float, float, float] | None] = field(default_factory=list)

    def take(self, run: Any) -> None:
        """Add a run."""
        plan = run.recipe.plan
        expected = plan.predicted if plan is not None else None
        self.latency_s.append(run.latency_s)
        self.cold.append(sum(row.cold for row in run.stage_runs))
        self.start_s.append(sum(row.start_s for row in run.stage_runs))
        self.cost_usd.append(run.cost_usd)
        told = (expected.latency_s.p50, expected.latency_at_percentile_s, expected.cost_usd.mean) if expected else None
        self.predicted.append(told)


def busy(x: int, seconds: float) -> int:
    """Work that takes so long of a core."""
    begun = time.thread_time()
    while time.thread_time() - begun < seconds:
        pass
    return x


def stock() -> Any:
    """The flow as it would be without a deadline."""
    from prefect import flow, task

    from prefect_slo import slo_task

    @slo_task(pool="cpu", idempotent=True)
    @task
    def read(x: int) -> int:
        return busy(x, 0.02)

    @slo_task(pool="cpu", idempotent=True)
    @task
    def prepare(x: int) -> int:
        return busy(x, 0.10)

    @slo_task(pool="gpu", idempotent=True)
    @task
    def detect(x: int) -> int:
        return busy(x, 0.15)

    @slo_task(pool="gpu", idempotent=True)
    @task
    def write(x: int) -> int:
        return busy(x, 0.02)

    @flow(name="work-pool-model")
    def mapped(n: int = ITEMS) -> int:
        return sum(write.map(detect.map(prepare.map(read.map(range(n))))).result())

    return mapped


def wait_for(pool: str) -> None:
    """Until the pool's worker is online."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import WorkPoolStatus

    with get_client(sync_client=True) as client:
        while client.read_work_pool(pool).status != WorkPoolStatus.READY:
            time.sleep(0.5)


def stage_words(row: Any) -> str:
    """A stage run in a line."""
    times = f"wall {row.wall_s:.2f}, start {row.start_s:.2f}, queue {row.queue_s:.2f}, held {row.billed_s:.2f}"
    return f"    {row.stage:8} {row.workers} on {row.hardware}: {times}{', cold' if row.cold else ''}"


def measure(runs: int, calibrate: int, poll_s: float, pauses: float, seed: int) -> dict[str, Any]:
    """Calibrate, plan and run; everything that was seen."""
    import numpy as np
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    from prefect_slo import WorkPool, slo
    from prefect_slo.decorators import director_of
    from prefect_slo.errors import InfeasibleSlo
    from prefect_slo.loop import background
    from prefect_slo.loop.director import Following, following
    from prefect_slo.loop.knowledge import knowledge
    from prefect_slo.loop.learning import refit
    from prefect_slo.loop.replanning import surest
    from prefect_slo.objective import Latency, Slo
    from prefect_slo.resources import Size
    from prefect_slo.runner.recipe import Recipe
    from prefect_slo.runner.work_pools import shut_offices

    sys.path.insert(0, str(Path(__file__).parent))
    from work_pool import worker

    rng, flow = np.random.default_rng(seed), stock()
    gaps_s = np.where(rng.random(calibrate + runs) < pauses, PAUSE_S, BREATH_S).tolist()
    with ExitStack() as stack:
        stack.enter_context(prefect_test_harness(server_startup_timeout=240))
        modules, storage = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
        os.environ["PREFECT_INTEGRATIONS_SLO_HOME"] = stack.enter_context(tempfile.TemporaryDirectory())
        for pool in ("cpu", "gpu"):
            stack.enter_context(worker(pool, str(PREFECT_API_URL.value()), modules, poll_s))
            wait_for(pool)
        pools = [
            WorkPool(
                name, (Size(0.5, 512),), storage, workers=(1,), concurrency=2, idle_s=IDLE_S, hardware=f"made-up-{name}"
            )
            for name in ("cpu", "gpu")
        ]
        stack.callback(shut_offices)

        def series(decorated: Any, gaps: Any, what: str, told: Following | None = None) -> Series:
            found, heard = Series(), []
            director = director_of(decorated)
            usual = director.observed
            director.observed = lambda run: (heard.append(run), usual(run))  # type: ignore[method-assign]
            with following(told) if told is not None else ExitStack():
                for number, gap in enumerate(gaps):
                    time.sleep(gap)
                    assert decorated(ITEMS) == sum(range(ITEMS))
                    found.take(heard[-1])
                    if os.environ.get("STAGES"):
                        print(*(stage_words(row) for row in heard[-1].stage_runs), sep="\n", file=sys.stderr)
                    seen = f"{found.latency_s[-1]:6.2f} s, {found.cold[-1]} cold ({found.start_s[-1]:5.2f} s)"
                    print(f"{what} {number + 1}/{len(gaps)}: {seen}, gap {gap:.1f} s", file=sys.stderr)
            background.settle(60)
            return found

        loose = slo(latency=600, pools=pools, explore=0)(flow)
        observing = Following(recipe=Recipe(workers=1), learn=True, flow_name=flow.name)
        first = series(loose, gaps_s[:calibrate], "calibrate", observing)
        refit(flow.name)
        known = knowledge(flow.name)
        assert known.model is not None, known.missing()
        bound = surest(known.model, Slo(Latency(600)), seed=seed).predicted.latency_at_percentile_s  # type: ignore[union-attr]
        for _ in range(8):  # the tightest deadline that the planner certifies
            try:
                plan = surest(known.model, Slo(Latency(bound)), seed=seed)
                if plan.certificate is not None and plan.certificate.confidence >= 0.9:
                    break
            except InfeasibleSlo:
                pass
            bound *= 1.03
        bound = round(bound, 2)
        then = series(slo(latency=bound, pools=pools, explore=0, mode="enforce")(flow), gaps_s[calibrate:], "run")
    return {"bound_s": bound, "calibration": first, "runs": then}


def told(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Figures, and whether they keep the bars."""
    import numpy as np

    first, then, bound = found["calibration"], found["runs"], found["bound_s"]
    p50, p95, usd = then.predicted[0]
    actual50, actual95 = (float(np.quantile(then.latency_s, q)) for q in (0.5, 0.95))
    rng = np.random.default_rng(0)
    drawn = np.quantile(rng.choice(then.latency_s, (2000, len(then.latency_s))), 0.95, axis=1)
    misses = sum(latency > bound for latency in then.latency_s)
    return {
        "load": os.getloadavg()[0],
        "poll_s": options.poll,
        "runs": len(then.latency_s),
        "calibration_runs": len(first.latency_s),
        "share_of_runs_with_a_start": {
            "calibration": round(statistics.fmean(c > 0 for c in first.cold), 3),
            "runs": round(statistics.fmean(c > 0 for c in then.cold), 3),
        },
        "start_s_where_there_was_one": round(statistics.fmean([s for s in then.start_s if s > 0] or [0.0]), 2),
        "p50_s": {"predicted": round(p50, 2), "actual": round(actual50, 2), "ratio": round(p50 / actual50, 3)},
        "p95_s": {
            "predicted": round(p95, 2),
            "actual": round(actual95, 2),
            "ratio": round(p95 / actual95, 3),
            "actual_95_percent_interval": [round(float(q), 2) for q in np.quantile(drawn, (0.025, 0.975))],
        },
        "usd": {"predicted": usd, "actual": statistics.fmean(then.cost_usd)},
        "deadline_s": bound,
        "misses": misses,
        "plans_followed": len({each for each in then.predicted if each is not None}),
        "kept": {"p95 within 10 %": abs(p95 / actual95 - 1) <= MARGIN - 1, "misses <= 6 of 60": misses <= MISSES},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--calibrate", type=int, default=24)
    parser.add_argument("--poll", type=float, default=1.0, help="PREFECT_WORKER_QUERY_SECONDS of the workers")
    parser.add_argument("--pauses", type=float, default=0.3, help="share of runs that come after a pause")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = measure(options.runs, options.calibrate, options.poll, options.pauses, options.seed)
    print(json.dumps(told(found, options), indent=2))


if __name__ == "__main__":
    main()

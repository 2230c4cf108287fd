"""Work pools against a bare ``run_deployment``, on a real server with real workers of two pools on this machine.

``python tests/benchmarks/work_pool.py [--rounds 8] [--bundles 60] [--poll 1]``. Every round measures, in the same flow
and one after the other, ``run_deployment`` of a flow that does nothing (state polled every 0.2 s), and a call in a pool
whose pilots don't stay (``idle_s=0``: a job for each lease). Then one pilot of another pool takes single-call bundles.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")

NOTHING = """
from prefect import flow

@flow
def nothing() -> int:
    return 1
"""


@contextmanager
def worker(pool: str, api: str, modules: str, poll_s: float) -> Iterator[None]:
    """A process worker of a pool, made here."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    env = {
        **os.environ,
        "PREFECT_API_URL": api,
        "PREFECT_WORKER_QUERY_SECONDS": str(poll_s),
        "PYTHONPATH": os.pathsep.join([modules, os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def deploy_nothing(pool: str, modules: str) -> None:
    """The flow that does nothing, by its module's name, as pilots are."""
    from prefect.client.orchestration import get_client

    Path(modules, "slo_nothing.py").write_text(NOTHING, encoding="utf-8")
    sys.path.insert(0, modules)
    from slo_nothing import nothing  # type: ignore[import-not-found]

    with get_client(sync_client=True) as client:
        client.create_deployment(
            client.create_flow(nothing), pool, work_pool_name=pool, entrypoint="slo_nothing.nothing"
        )


def measure(rounds: int, bundles: int, poll_s: float) -> dict[str, Any]:
    """Seconds of every round and bundle."""
    from prefect import flow, task
    from prefect.deployments import run_deployment
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    from prefect_slo import SLOTaskRunner, WorkPool, slo_task
    from prefect_slo.resources import Size
    from prefect_slo.runner.work_pools import shut_offices

    seconds: dict[str, list[float]] = {"run_deployment": [], "carrier": [], "pilot's first": [], "warm pilot": []}

    def timed(what: str, call: Any) -> None:
        begun = time.monotonic()
        call()
        seconds[what].append(time.monotonic() - begun)
        print(f"{what}: {seconds[what][-1]:.3f} s", file=sys.stderr)

    with ExitStack() as stack:
        stack.enter_context(prefect_test_harness(server_startup_timeout=240))
        modules, storage = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
        for pool in ("cpu", "gpu"):
            stack.enter_context(worker(pool, str(PREFECT_API_URL.value()), modules, poll_s))
        deploy_nothing("cpu", modules)
        carriers = WorkPool("cpu", (Size(1, 512),), storage, concurrency=1, idle_s=0)
        pilots = WorkPool("gpu", (Size(1, 512),), storage, concurrency=1, idle_s=60, hardware="made-up-gpu")
        stack.callback(shut_offices)

        @slo_task(pool="cpu")
        @task
        def carried(x: int) -> int:
            return x

        @slo_task(pool="gpu")
        @task
        def piloted(x: int) -> int:
            return x

        @flow(task_runner=SLOTaskRunner(pools=[carriers, pilots], record="full"))
        def measured() -> None:
            for _ in range(rounds):
                timed("run_deployment", lambda: run_deployment("nothing/cpu", poll_interval=0.2, as_subflow=False))
                time.sleep(0.5)  # the job's processes are still ending
                timed("carrier", lambda: carried.submit(1).result())
                time.sleep(0.5)
            timed("pilot's first", lambda: piloted.submit(1).result())
            for _ in range(bundles):
                timed("warm pilot", lambda: piloted.submit(1).result())
                time.sleep(0.1)  # longer than an idle lease is kept: every call is a lease and a bundle of its own

        measured()
    return seconds  # type: ignore[return-value]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--bundles", type=int, default=60)
    parser.add_argument("--poll", type=float, default=1.0, help="PREFECT_WORKER_QUERY_SECONDS of the workers")
    options = parser.parse_args()
    seconds = measure(options.rounds, options.bundles, options.poll)
    told = {
        what: {"median_s": round(statistics.median(all_s), 3), "max_s": round(max(all_s), 3), "n": len(all_s)}
        for what, all_s in seconds.items()
    }
    ratios = [c / d for c, d in zip(seconds["carrier"], seconds["run_deployment"], strict=True)]
    told["carrier / run_deployment"] = {
        "of medians": round(told["carrier"]["median_s"] / told["run_deployment"]["median_s"], 3),
        "median of rounds": round(statistics.median(ratios), 3),
    }
    print(json.dumps({"load": os.getloadavg()[0], **told}, indent=2))


if __name__ == "__main__":
    main()

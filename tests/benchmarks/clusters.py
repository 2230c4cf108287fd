"""Mapped no-op items on a local Dask and a local Ray cluster: the stock runners of the integrations against ours.

    python tests/benchmarks/clusters.py [--items 2000] [--stock-items 200] [--only dask,ray]

Both run on the same cluster of this machine, which is up before either begins. The stock runners get fewer items, as
each takes them tens of milliseconds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

import psutil
from prefect import flow, task
from prefect.testing.utilities import prefect_test_harness

from prefect_slo import DaskPool, RayPool, SLOTaskRunner
from prefect_slo.resources import Size

SIZE = Size(1, 512)


@task
def noop(x: int) -> int:
    return x


def per_item_ms(runner: Any, items: int) -> float:
    """Milliseconds an item in the flow, its workers warm."""

    @flow(task_runner=runner)
    def mapped(n: int) -> float:
        noop.map(range(20)).result()
        began = time.perf_counter()
        assert noop.map(range(n)).result() == list(range(n))
        return time.perf_counter() - began

    calm()
    return 1000 * mapped(items) / items


def calm() -> None:
    """Wait until the server has taken in what it was sent."""
    until, quiet = time.monotonic() + 40, 0
    while quiet < 3 and time.monotonic() < until:
        quiet = quiet + 1 if psutil.cpu_percent(1.0) < 35 else 0


@contextmanager
def dask() -> Iterator[tuple[Any, Callable[[str], Any]]]:
    from distributed import LocalCluster
    from prefect_dask import DaskTaskRunner

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        pool = DaskPool(address, sizes=(SIZE,), concurrency=2)
        yield (
            DaskTaskRunner(address=address),
            lambda level: SLOTaskRunner(pools=[pool], pool="dask", record=level),
        )


@contextmanager
def ray() -> Iterator[tuple[Any, Callable[[str], Any]]]:
    import ray
    from prefect_ray import RayTaskRunner

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="prefect")
    try:
        pool = RayPool(sizes=(SIZE,), concurrency=2)
        yield RayTaskRunner(), lambda level: SLOTaskRunner(pools=[pool], pool="ray", record=level)
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--stock-items", type=int, default=200)
    parser.add_argument("--only", default="dask,ray")
    arguments = parser.parse_args()
    with prefect_test_harness(server_startup_timeout=60):
        for name, cluster in (("dask", dask), ("ray", ray)):
            if name not in arguments.only.split(","):
                continue
            with cluster() as (stock, ours):
                base = per_item_ms(stock, arguments.stock_items)
                print(f"{name}: stock runner, {arguments.stock_items} items: {base:.2f} ms an item", flush=True)
                for level in ("full", "summary"):
                    took = per_item_ms(ours(level), arguments.items)
                    line = (
                        f"{name}: {level}, {arguments.items} items: {took:.2f} ms an item, {base / took:.1f} x as fast"
                    )
                    print(line + (" (promised: 5 x)" if level == "summary" else ""), flush=True)
        calm()  # a process that ends sends what it has left to send, and the server must still be there to take it


if __name__ == "__main__":
    main()

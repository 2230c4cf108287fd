"""A local Dask and a local Ray cluster: the stock runners of the integrations against ours, and how data pass there.

    python tests/benchmarks/clusters.py [--items 2000] [--stock-items 200] [--only dask,ray]
    python tests/benchmarks/clusters.py --passing 16 [--mb 8] [--repeats 5] [--only dask,ray]

Mapped no-op items run on the same cluster of this machine, which is up before either begins. The stock runners get
fewer items, as each takes them tens of milliseconds. With ``--passing``, so many results of so many megabytes go from
one stage to the next: by turns kept on the cluster, and through the flow's process.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

import psutil
from prefect import flow, task, unmapped
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


@task
def make(number: int, mb: int) -> bytes:
    return bytes([number % 256]) * (mb << 20)


@task
def measured(data: bytes) -> int:
    return len(data)


def passing_s(pool: Any, items: int, mb: int) -> float:
    """Seconds of two stages, in the flow, its workers warm."""

    @flow(task_runner=SLOTaskRunner(pools=[pool], pool=pool.name, record="summary", bundle=1))
    def two_stages() -> float:
        noop.map(range(20)).result()
        began = time.perf_counter()
        made = make.map(range(items), unmapped(mb))
        assert measured.map(made).result() == [mb << 20] * items
        return time.perf_counter() - began

    return two_stages()


def compare_passing(name: str, pool: Any, items: int, mb: int, repeats: int) -> None:
    """Print the median of both ways, taken by turns."""
    took: dict[str, list[float]] = {"direct": [], "inline": []}
    for turn in range(repeats + 1):
        for way, keep_mb in (("direct", 1.0), ("inline", None)):
            seconds = passing_s(replace(pool, keep_mb=keep_mb), items, mb)
            if turn:  # the first is for warming up
                took[way].append(seconds)
    direct, inline = (median(took[way]) for way in ("direct", "inline"))
    print(
        f"{name}: {items} x {mb} MB between two stages: {direct:.2f} s kept there ({items * mb / direct:.0f} MB/s), "
        f"{inline:.2f} s through the flow's process ({items * mb / inline:.0f} MB/s), {inline / direct:.2f} x; "
        f"all: {[round(s, 2) for s in took['direct']]}, {[round(s, 2) for s in took['inline']]}",
        flush=True,
    )


def calm() -> None:
    """Wait until the server has taken in what it was sent."""
    until, quiet = time.monotonic() + 40, 0
    while quiet < 3 and time.monotonic() < until:
        quiet = quiet + 1 if psutil.cpu_percent(1.0) < 35 else 0


@contextmanager
def dask() -> Iterator[tuple[Any, Callable[[str], Any], Any]]:
    from distributed import LocalCluster
    from prefect_dask import DaskTaskRunner

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        pool = DaskPool(address, sizes=(SIZE,), concurrency=2)
        yield (
            DaskTaskRunner(address=address),
            lambda level: SLOTaskRunner(pools=[pool], pool="dask", record=level),
            pool,
        )


@contextmanager
def ray() -> Iterator[tuple[Any, Callable[[str], Any], Any]]:
    import ray
    from prefect_ray import RayTaskRunner

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="prefect")
    try:
        pool = RayPool(sizes=(SIZE,), concurrency=2)
        yield RayTaskRunner(), lambda level: SLOTaskRunner(pools=[pool], pool="ray", record=level), pool
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--stock-items", type=int, default=200)
    parser.add_argument("--passing", type=int, default=0)
    parser.add_argument("--mb", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="dask,ray")
    arguments = parser.parse_args()
    with prefect_test_harness(server_startup_timeout=60):
        for name, cluster in (("dask", dask), ("ray", ray)):
            if name not in arguments.only.split(","):
                continue
            with cluster() as (stock, ours, pool):
                if arguments.passing:
                    compare_passing(name, pool, arguments.passing, arguments.mb, arguments.repeats)
                    continue
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

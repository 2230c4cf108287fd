"""What a task run costs with each task runner: no-op mapped items, everything measured in one run of this script.

    python tests/benchmarks/runner_overhead.py [--items 2000] [--stock-process-items 300] [--repeat 1]

Needs a running Prefect server (``PREFECT_API_URL``); without one it starts a temporary one. Prints a line per runner:
time in the flow function per item, the tail from its return to the flow's end, CPU of this process and of its workers
per item; then the ratios that the project promises. ``ProcessPoolTaskRunner`` gets fewer items, as it takes 64 ms each.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

import psutil
from prefect import flow, task
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from prefect_slo.control import Scheduler, StageRule
from prefect_slo.control import events as e
from prefect_slo.runner.task_runner import SLOTaskRunner

QUIET_S = 40.0
LEVELS = ("full", "summary", "bare", "auto")


@task
def noop(x: int) -> int:
    return x


@dataclass
class Took:
    """One measured flow run; times in seconds."""

    items: int
    in_flow_s: float
    tail_s: float
    own_cpu_s: float
    workers_cpu_s: float

    @property
    def per_item_ms(self) -> float:
        return 1e3 * self.in_flow_s / self.items

    @property
    def cpu_ms(self) -> float:
        """CPU per item, of this process and its workers."""
        return 1e3 * (self.own_cpu_s + self.workers_cpu_s) / self.items

    def line(self, name: str) -> str:
        own, workers = 1e3 * self.own_cpu_s / self.items, 1e3 * self.workers_cpu_s / self.items
        return (
            f"{name:24s} {self.items:6d} items  {self.in_flow_s:7.2f} s in flow  {self.per_item_ms:7.2f} ms/item  "
            f"tail {self.tail_s:5.2f} s  CPU {own:5.2f} + {workers:5.2f} ms/item"
        )


def workers_cpu_s() -> float:
    used = 0.0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "uvicorn" not in " ".join(child.cmdline()):
                times = child.cpu_times()
                used += times.user + times.system + times.children_user + times.children_system
    return used


def measure(make: Callable[[], Any], items: int, *, warm: bool) -> Took:
    seen: dict[str, float] = {}

    @flow(task_runner=make())
    def mapped(n: int) -> int:
        own, workers, began = time.process_time(), workers_cpu_s(), time.perf_counter()
        found = len(noop.map(range(n)).result())
        seen["returned"] = time.perf_counter()
        seen["in_flow"] = seen["returned"] - began
        seen["own"], seen["workers"] = time.process_time() - own, workers_cpu_s() - workers
        return found

    if warm:
        mapped(50)
        settle()
    assert mapped(items) == items
    ended = time.perf_counter()
    return Took(items, seen["in_flow"], ended - seen["returned"], seen["own"], seen["workers"])


def settle() -> None:
    """Wait until the server has digested what it was sent: the next runner must not pay for the last one's events."""
    deadline, calm = time.monotonic() + QUIET_S, 0
    while calm < 3 and time.monotonic() < deadline:
        calm = calm + 1 if psutil.cpu_percent(1.0) < 35 else 0


def scheduler_us(items: int = 100_000) -> float:
    """Microseconds of the scheduler per item, over a stage of 8 workers with items of 0.1 ms."""
    handle = Scheduler().handle
    began = time.process_time()
    handle(e.PlanChanged("work", StageRule("process", workers=8)), 0.0)
    for first in range(0, items, 2000):
        handle(e.Submitted("work", tuple(range(first, first + 2000))), 0.0)
    for lease in range(1, 9):
        queue = [action for action in handle(e.LeaseUp(lease), 0.0) if isinstance(action, e.Dispatch)]
        while queue:
            dispatch = queue.pop()
            handle(e.ItemDone(dispatch.lease, dispatch.items), 0.0)
            done = handle(e.BundleDone(dispatch.lease, 1e-4 * len(dispatch.items)), 0.0)
            queue += [action for action in done if isinstance(action, e.Dispatch)]
    return 1e6 * (time.process_time() - began) / items


@contextlib.contextmanager
def server() -> Iterator[None]:
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=60):
        yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--stock-process-items", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", help="comma-separated names of runners, e.g. stock-thread,process-full")
    arguments = parser.parse_args()
    runners: dict[str, Callable[[], Any]] = {
        "stock-thread": lambda: ThreadPoolTaskRunner(max_workers=16),
        "stock-process": lambda: ProcessPoolTaskRunner(max_workers=2),
    }
    for level in LEVELS:
        for isolation in ("thread", "process"):
            runners[f"{isolation}-{level}"] = lambda i=isolation, r=level: SLOTaskRunner(isolation=i, record=r)
    for isolation in ("thread", "process"):  # a bundle for every item: what a dispatch costs
        runners[f"{isolation}-single"] = lambda i=isolation: SLOTaskRunner(isolation=i, record="bare", bundle=1)
    wanted = arguments.only.split(",") if arguments.only else list(runners)
    print(f"scheduler alone: {scheduler_us():.1f} µs an item")
    took: dict[str, Took] = {}
    with server():
        for name in wanted:
            stock = name == "stock-process"
            items = arguments.stock_process_items if stock else arguments.items
            runs = [measure(runners[name], items, warm=not stock) for _ in range(arguments.repeat) if settle() is None]
            took[name] = sorted(runs, key=lambda run: run.in_flow_s)[len(runs) // 2]
            print(took[name].line(name), flush=True)
    promises = [
        ("process-full", "stock-process", 15.0),
        ("process-summary", "stock-process", 40.0),
        ("thread-summary", "stock-thread", 2.5),
        ("process-summary", "stock-thread", 1.8),
    ]
    for ours, stock, bar in promises:
        if ours in took and stock in took:
            ratio = took[stock].per_item_ms / took[ours].per_item_ms
            print(f"{ours} is {ratio:6.1f} x as fast as {stock} (promised: {bar:g} x)")
    for name in ("thread-auto", "process-auto"):
        if name in took:
            print(f"{name}: the flow ends {took[name].tail_s:.2f} s after its last item (promised: 3 s)")
    for isolation in ("thread", "process"):
        if (single := took.get(f"{isolation}-single")) and (bare := took.get(f"{isolation}-bare")):
            print(f"a bundle on {isolation} costs {single.cpu_ms - bare.cpu_ms:.2f} ms of CPU (promised: 0.5 ms)")


if __name__ == "__main__":
    main()

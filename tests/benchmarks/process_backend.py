"""What worker processes cost: ``python tests/benchmarks/process_backend.py``. Prints medians; nothing is asserted."""

from __future__ import annotations

import os
import pickle
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

from prefect_slo.resources import Size
from prefect_slo.runner.backends.processes import ProcessBackend
from prefect_slo.runner.backends.protocol import Bundle, Finished, Opened, Outcome, Report
from prefect_slo.runner.local.launch import StartMethod
from prefect_slo.runner.local.ledger import FileBook, Ledger

PRELOAD = ("prefect", "prefect.main", "prefect.task_engine", "cloudpickle")
CLOCK: Callable[[], float] = time.perf_counter


def program(run_item: Callable[[int, Any], Outcome]) -> bytes:
    class Given:
        def open(self, emit: Callable[[bytes], None]) -> Callable[[int, Any], Outcome]:
            return run_item

    return bytes(cloudpickle.dumps(Given()))


class Client:
    """Runs one thing at a time on a backend of its own."""

    def __init__(self, start: StartMethod, preload: tuple[str, ...] = ()) -> None:
        self.book = tempfile.TemporaryDirectory()
        ledger = Ledger(FileBook(Path(self.book.name) / "book.json"), cores=range(8), vcpus=8)
        self.backend = ProcessBackend(start=start, preload=preload, ledger=ledger)
        self.reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self.lease = 0

    def open(self) -> Opened:
        self.lease += 1
        self.backend.open(self.lease, Size(1, 2048), self.reports.put)
        return self.wait(Opened)

    def run(self, bundle: Bundle) -> Any:
        self.backend.submit(self.lease, bundle)
        return self.wait(Finished)

    def wait(self, kind: type) -> Any:
        while not isinstance(report := self.reports.get(timeout=60), kind):
            pass
        return report

    def close(self) -> None:
        self.backend.shutdown()
        self.book.cleanup()


def seconds(action: Callable[[], object], times: int) -> list[float]:
    taken = []
    for _ in range(times):
        begun = CLOCK()
        action()
        taken.append(CLOCK() - begun)
    return sorted(taken)


def show(what: str, taken: list[float], scale: float, unit: str) -> None:
    p95 = taken[min(len(taken) - 1, int(0.95 * len(taken)))]
    print(f"{what:<58} median {statistics.median(taken) * scale:9.2f}   p95 {p95 * scale:9.2f} {unit}", flush=True)


def cold_starts() -> None:
    ways: tuple[StartMethod, ...] = ("zygote", "spawn")
    for start in ways:
        for name, preload in (("nothing", ()), ("prefect", PRELOAD)):
            client = Client(start, preload)
            first = client.open().start_s
            later = sorted(client.open().start_s for _ in range(4))
            show(f"cold start, {start}, {name} imported: first", [first], 1e3, "ms")
            show(f"cold start, {start}, {name} imported: later", later, 1e3, "ms")
            client.close()


def bundles() -> None:
    client = Client("zygote")
    client.open()
    done = Outcome(b"")
    nothing = program(lambda item, payload: done)
    one = Bundle(1, "nothing", nothing, ((0, b""),))
    client.run(one)
    show("round trip of a bundle of one", seconds(lambda: client.run(one), 2000), 1e6, "µs")
    before = os.times()
    for _ in range(2000):
        client.run(one)
    after = os.times()
    own = (after.user + after.system - before.user - before.system) / 2000
    print(f"{'CPU of the parent for it':<58} {own * 1e6:16.2f} µs")

    many = Bundle(1, "nothing", nothing, tuple((item, b"") for item in range(2000)))
    show("one item of a bundle of 2,000", [taken / 2000 for taken in seconds(lambda: client.run(many), 20)], 1e6, "µs")

    echo = program(lambda item, payload: Outcome(payload))
    large = Bundle(1, "echo", echo, ((0, os.urandom(100 << 20)),))
    taken = seconds(lambda: client.run(large), 5)
    show("100 MB there and back", taken, 1e3, "ms")
    print(f"{'throughput, both ways together':<58} {0.2 / statistics.median(taken):16.2f} GB/s")

    def lend() -> None:
        client.backend.close(client.lease)
        client.open()

    show("close a lease, open the next on the warm worker", seconds(lend, 300), 1e6, "µs")
    client.close()


def ledgers() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(FileBook(Path(folder) / "book.json"), cores=range(64), vcpus=64)
        for held in (0, 30):
            for _ in range(held):
                ledger.claim(1)

            def both() -> None:
                ledger.release(ledger.claim(1))

            show(f"ledger: claim and release, {held} held", seconds(both, 1000), 1e6, "µs")


if __name__ == "__main__":
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, pickle protocol {pickle.HIGHEST_PROTOCOL}")
    cold_starts()
    bundles()
    ledgers()

"""What the Lambda backend adds to a handler's own time, and how many invocations it makes a second, in the test bed.

``python tests/benchmarks/lambda_backend.py``; everything runs on this machine, handlers included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from queue import SimpleQueue
from typing import Any

import cloudpickle

from prefect_slo.aws import exchange
from prefect_slo.resources import Size
from prefect_slo.runner.backends.aws_lambda import LambdaBackend
from prefect_slo.runner.backends.protocol import Bundle, Carry, Finished, ItemReport, Lost, Opened, Outcome
from prefect_slo.testing.aws import LocalAws, local_aws


class Once:
    """Sends each item's arguments out by itself."""

    def __init__(self, function: Any) -> None:
        self.function = cloudpickle.dumps(function)

    def host(self, items: Any, carry: Carry, report: Any) -> None:
        for item, arguments in items:
            started = time.monotonic()
            [carried] = carry(self.function, [(item, cloudpickle.dumps((arguments, {})))])
            assert not carried.failed, carried.value
            report(ItemReport(item, Outcome(carried.value), started, time.monotonic()))


def overhead_ms(account: LocalAws, backend: LambdaBackend, program: Once, arguments: Any, calls: int) -> float:
    """Median of what a call takes beyond its handler, warm."""
    reports: SimpleQueue[Any] = SimpleQueue()
    backend.open(1, Size(1, 512), reports.put)
    assert isinstance(reports.get(), Opened)
    took = []
    for bundle in range(calls + 3):
        before = len(account.lambdas.invocations)
        begun = time.perf_counter()
        backend.submit(1, Bundle(bundle, "b", program, ((bundle, arguments),)))
        while not isinstance(report := reports.get(), Finished):
            assert not isinstance(report, Lost), report
        elapsed_ms = 1000 * (time.perf_counter() - begun)
        if bundle >= 3:
            took.append(elapsed_ms - account.lambdas.invocations[before].duration_ms)
    backend.close(1)
    return statistics.median(took)


def per_second(backend: LambdaBackend, program: Once, width: int, calls: int) -> float:
    """Invocations a second from so many leases at once, warm."""
    reports: SimpleQueue[Any] = SimpleQueue()
    for lease in range(100, 100 + width):
        backend.open(lease, Size(1, 512), reports.put)
    left, begun, done = calls + width, 0.0, 0
    bundle = 10_000
    while done < calls + width:
        report = reports.get()
        assert not isinstance(report, Lost), report
        if isinstance(report, Finished):
            done += 1
            if done == width:
                begun = time.perf_counter()
        if isinstance(report, (Opened, Finished)) and left:
            left, bundle = left - 1, bundle + 1
            backend.submit(report.lease, Bundle(bundle, "b", program, ((bundle, (0.2,)),)))
    return calls / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    with local_aws() as account:
        pool = account.pool(memory_mb=(512,), concurrency=options.width + 1)
        backend = pool.backend(None)
        inline = overhead_ms(account, backend, Once(lambda x: x), (1,), options.calls)
        print(f"inline: {inline:.2f} ms beyond the handler")
        inline_bytes, exchange.INLINE_BYTES = exchange.INLINE_BYTES, 100_000  # what is larger goes over S3
        one = overhead_ms(account, backend, Once(len), (b"x" * 1_000_000,), options.calls // 2)
        exchange.INLINE_BYTES = inline_bytes
        print(f"1 MB of arguments over S3: {one:.1f} ms beyond the handler")
        large = overhead_ms(account, backend, Once(len), (b"x" * 5_000_000,), options.calls // 10)
        print(f"5 MB of arguments over S3: {large:.1f} ms beyond the handler")
        rate = per_second(backend, Once(time.sleep), options.width, 4 * options.calls)
        print(f"{options.width} at once, 0.2 s each: {rate:.0f} invocations a second")
        backend.shutdown()


if __name__ == "__main__":
    main()

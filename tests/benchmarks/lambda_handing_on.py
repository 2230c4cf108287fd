"""What passes through the flow's process where a large result goes to the calls of the next stage, in the test bed.

``python tests/benchmarks/lambda_handing_on.py``; functions, S3 and flow are on this machine, with one loopback for all.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import botocore.client
from prefect import flow, task, unmapped
from prefect.testing.utilities import prefect_test_harness

from prefect_slo import SLOTaskRunner, slo_task
from prefect_slo.testing.aws import local_aws


@slo_task(pool="lambda")
@task
def make(size: int) -> bytes:
    return bytes(size)


@slo_task(pool="lambda")
@task
def take(x: int, data: bytes) -> int:
    return x + len(data)


def counted(seen: Counter[str]) -> None:
    """Count this process's requests to S3 and their bytes from now on."""
    original = botocore.client.BaseClient._make_api_call

    def call(self: Any, operation: str, wanted: dict[str, Any]) -> Any:
        size = len(wanted.get("Body", b""))
        answer = original(self, operation, wanted)
        if operation in ("PutObject", "UploadPart"):
            seen.update(puts=1, put_mb=size / 1e6)
        if operation == "GetObject":
            seen.update(gets=1, get_mb=int(answer["ContentLength"]) / 1e6)
        return answer

    botocore.client.BaseClient._make_api_call = call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=20)
    parser.add_argument("--calls", type=int, default=8)
    options = parser.parse_args()
    size, seen = options.mb * 1_000_000, Counter[str]()
    with prefect_test_harness(), local_aws() as account:
        pool = account.pool(memory_mb=(1769,), concurrency=4)

        @flow(task_runner=SLOTaskRunner(pools=[pool], record="bare", max_workers=4))
        def from_a_stage() -> list[int]:
            return take.map(range(options.calls), unmapped(make.submit(size))).result()

        @flow(task_runner=SLOTaskRunner(pools=[pool], record="bare", max_workers=4))
        def from_the_flow() -> list[int]:
            return take.map(range(options.calls), unmapped(bytes(size))).result()

        from_a_stage()  # environments have started
        counted(seen)
        for run in (from_a_stage, from_the_flow):
            seen.clear()
            begun = time.perf_counter()
            assert run() == [x + size for x in range(options.calls)]
            took_s = time.perf_counter() - begun
            print(
                f"{run.__name__}: {options.mb} MB to {options.calls} calls, {took_s:.2f} s; by the flow's process "
                f"{seen['puts']:.0f} writes of {seen['put_mb']:.0f} MB, "
                f"{seen['gets']:.0f} reads of {seen['get_mb']:.0f} MB"
            )


if __name__ == "__main__":
    main()

"""The same pipeline with its stages on AWS Lambda, in a mocked account: handlers really run, nothing leaves it.

Needs ``prefect-slo[testing,demo]`` and Linux. On real AWS only the pool differs: ``LambdaPool(role=..., bucket=...)``
with a layer or an image that brings numpy, scipy and scikit-learn, deployed by ``prefect-slo aws deploy``.
"""

from __future__ import annotations

import argparse
import time
from decimal import Decimal

from flow import stock
from prefect import Flow

from prefect_slo import Plan, SLOTaskRunner
from prefect_slo.aws.report import bill
from prefect_slo.plan import StagePlan
from prefect_slo.pricing import price_list
from prefect_slo.resources import Size
from prefect_slo.testing.aws import local_aws


def plan(sizes: tuple[Size, ...]) -> Plan:
    """Small workers for most, a larger one for the stage that everything waits for."""
    small, large = sizes[0], sizes[-1]
    return Plan(
        "ml-pipeline",
        None,
        {
            "pca": StagePlan(1, large, "lambda"),
            "train": StagePlan(4, small, "lambda"),
            "merge": StagePlan(1, large, "lambda"),
            "test": StagePlan(1, large, "lambda"),
        },
    )


def compare(pipeline: Flow[..., float] = stock, scale: float = 0.1) -> tuple[float, float, float, int]:
    """Accuracy here and there, what it cost, and how many invocations it took."""
    here = pipeline(scale)
    with local_aws(packages=("numpy", "scipy", "sklearn", "joblib", "threadpoolctl", "narwhals")) as account:
        pool = account.pool(memory_mb=(1024, 1769), concurrency=4, timeout_s=120)
        there = pipeline.with_options(task_runner=SLOTaskRunner(plan(pool.pool.sizes), pools=[pool]))(scale)
        done = account.lambdas.invocations
        prices = price_list("aws-lambda-x86")
        cost = sum((bill(prices, one.memory_mb, one.billed_ms) for one in done), Decimal())
    return here, there, float(cost), len(done)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=0.1)
    begun = time.monotonic()
    here, there, cost, invocations = compare(scale=parser.parse_args().scale)
    print(f"accuracy here {here:.3f}, on Lambda {there:.3f}: {invocations} invocations, ${cost:.6f}")
    print(f"{time.monotonic() - begun:.0f} s in all")

"""Pools for the functions of a Function Definition Language file: where each may run is what its mode says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect_slo.aws.batch import BatchJobs
from prefect_slo.aws.fdl import FdlFunction
from prefect_slo.errors import InvalidValue
from prefect_slo.runner.aws_pools import BatchPool, LambdaPool
from prefect_slo.runner.pools import PoolDefinition


def pools_of(
    functions: Mapping[str, FdlFunction],
    *,
    bucket: Any,
    queue: str | None = None,
    gpu_queue: str | None = None,
    job: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[PoolDefinition]:
    """A pool for each function, by its name: Lambda alone, Lambda and then Batch, or Batch alone.

    Args:
        functions: As ``load_fdl`` returns them.
        bucket: Where large arguments and results go; see ``LambdaPool``.
        queue: Job queue of the functions that may run on Batch.
        gpu_queue: Job queue of those that need a GPU; by default ``queue``.
        job: Settings of ``BatchJobs`` beyond size and image.
        settings: Settings of ``LambdaPool`` beyond memory, timeout and temporary disk, such as ``role`` and ``layers``.

    Raises:
        InvalidValue: A function may run on Batch, and no queue is named; or a setting that can't be.
    """
    return [_pool(function, bucket, queue, gpu_queue or queue, job or {}, settings) for function in functions.values()]


def _pool(
    function: FdlFunction,
    bucket: Any,
    queue: str | None,
    gpu_queue: str | None,
    job: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> PoolDefinition:
    jobs = None
    if function.batch is not None:
        gpu = int(function.batch.gpu)
        where = gpu_queue if gpu else queue
        if where is None:
            raise InvalidValue(f"{function.name}.queue", None, f"a job queue, for mode {function.mode!r}")
        jobs = BatchJobs(
            where,
            function.image or "python",
            vcpus=function.batch.vcpus,
            memory_mb=function.batch.memory_mb,
            gpu=gpu,
            prices="aws-ec2-gpu" if gpu else "aws-fargate-x86",
            **job,
        )
    if function.mode == "batch":
        assert jobs is not None
        return BatchPool(
            jobs, bucket, hardware=function.batch.hardware if function.batch else "batch", name=function.name
        )
    return LambdaPool(
        memory_mb=(function.memory_mb,),
        timeout_s=function.timeout_s,
        storage_mb=function.storage_mb,
        bucket=bucket,
        batch=jobs,
        name=function.name,
        **settings,
    )

"""From a recipe and what a task declares to the rule by which the scheduler treats its stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from prefect import Task
from prefect.transactions import get_transaction

from prefect_slo.control import StageRule
from prefect_slo.declaration import Declaration, batched_names
from prefect_slo.errors import SloError
from prefect_slo.resources import Size
from prefect_slo.runner.local.limits import machine_memory_mb, machine_vcpus
from prefect_slo.runner.pools import PROCESS, THREAD, Pools, on_cpu, resolved
from prefect_slo.runner.recipe import Recipe

RETRIES_WHEN_IDEMPOTENT = 2


def stage_rule(
    stage: str,
    task: Task[Any, Any],
    recipe: Recipe,
    declaration: Declaration,
    *,
    processes: bool,
    pools: Pools = MappingProxyType({}),
    priority: float = 0.0,
    lacks_gpus: Callable[[str], str] = lambda _: "",
) -> StageRule:
    """The rule of a stage at its first call.

    Args:
        stage: Its name.
        task: Its task.
        recipe: How the run is run.
        declaration: What the user declared of the task.
        processes: Whether this machine has the process backend.
        pools: The flow's pools beyond this machine's.
        priority: Served before stages with a lower one.
        lacks_gpus: Why workers of a pool can have no GPU now; empty where they may. Asked where the stage is given one.
            Without, it is run on the CPU, with what else the plan gives it.

    Raises:
        UnknownPool: A pool that there isn't.
        SloError: The stage is pinned to processes inside a transaction that spans tasks.
    """
    planned = recipe.plan.stages.get(stage) if recipe.plan is not None else None
    isolation = declaration.isolation if declaration.isolation != "auto" else recipe.isolation
    named = [resolved(name, pools, stage=stage) for name in declaration.pools]
    pool = resolved(planned.pool if planned is not None else recipe.pool or PROCESS, pools, stage=stage)
    if named and (planned is None or pool not in named):
        planned = planned if {pool, named[0]} <= {PROCESS, THREAD} else None
        pool = named[0]
    pinned = isolation == PROCESS
    if isolation == THREAD or stage in recipe.on_threads or (pool == PROCESS and not processes):
        pool = THREAD
    if get_transaction() is not None:
        if pinned:
            raise SloError(
                f"stage {stage!r} is submitted inside a transaction and pinned to processes; a transaction "
                "spans only the flow's own process. Set its isolation to 'auto' or 'thread'."
            )
        pool = THREAD
    if planned is not None:
        size = planned.size
    elif pool in pools:
        size = _least(pools[pool].pool.sizes, declaration.memory_mb or 0)
    else:
        size = Size(min(1.0, machine_vcpus()), int(machine_memory_mb()))
    ladder = recipe.ladders.get(stage, ())
    if size.gpu and pool != THREAD and lacks_gpus(pool):
        size, ladder = on_cpu(size, pool, pools), tuple(on_cpu(larger, pool, pools) for larger in ladder)
    if pool == THREAD:  # threads share the interpreter: their times are no measure of a worker process
        size = replace(size.without_gpu, hardware=THREAD)
    workers = planned.workers if planned is not None else recipe.workers
    if workers is None and pool == PROCESS:
        workers = max(int(machine_vcpus()), 1)
    elif workers is None and pool in pools:
        workers = max(pools[pool].pool.workers, default=None)
    if declaration.concurrency is not None:
        workers = min(workers or declaration.concurrency, declaration.concurrency)
    return StageRule(
        pool=pool,
        size=size,
        workers=workers,
        bundle=planned.bundle if planned is not None else recipe.bundle,
        batch=planned.batch if planned is not None and batched_names(task) else 1,
        priority=priority,
        loss_retries=loss_retries(task, declaration),
        ladder=ladder,
        # threads of the flow's process would use a device that nobody has accounted for
        fallback=THREAD if pool != THREAD and not pinned and not (size.gpu and pool == PROCESS) else None,
        rerun_unpicklable=declaration.idempotent is not False,
        task=task.task_key,
        together=declaration.concurrency,
    )


def _least(sizes: Sequence[Size], memory_mb: int) -> Size:
    """The smallest size with that much memory, or the largest."""
    enough = [size for size in sizes if size.memory_mb >= memory_mb]
    return min(enough) if enough else max(sizes, key=lambda size: (size.memory_mb, size))


def loss_retries(task: Task[Any, Any], declaration: Declaration) -> int:
    """How often an item may run again after its worker was lost while it ran."""
    if declaration.idempotent is False:
        return 0
    return max(task.retries, RETRIES_WHEN_IDEMPOTENT) if declaration.idempotent else task.retries

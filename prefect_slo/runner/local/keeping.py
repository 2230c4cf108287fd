"""How long workers are kept, and which go first: pure decisions on what a pool holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from prefect_slo.errors import InvalidValue
from prefect_slo.resources import Size
from prefect_slo.runner.local.launch import StartMethod
from prefect_slo.runner.local.member import HEADROOM_MB, Fate, Worker

PATIENCE_S = 300.0


@dataclass(frozen=True)
class PoolConfig:
    """How a pool starts and keeps its workers.

    Attributes:
        env: Environment of workers beyond the parent's own, as sorted pairs.
        preload: Modules that workers find imported.
        start: ``zygote`` forks workers from one clean process (Linux), ``spawn`` starts an interpreter each,
            ``auto`` takes the first where it works.
        idle_s: A worker that nobody has used for this long is ended.
        max_idle: Workers kept warm at once; the one used least recently goes first.
        grace_s: How long workers may take to end when told to.
        start_timeout_s: How long they may take to start.
        patience_s: How long the first lease in line waits for its share of the machine before it goes without one.
            There is no going without a share of a GPU: a lease waits, and says so.
        gpu_devices: GPUs by name and memory, in place of those that ``nvidia-smi`` lists.
    """

    env: tuple[tuple[str, str], ...] = ()
    preload: tuple[str, ...] = ()
    start: StartMethod = "auto"
    idle_s: float = 60.0
    max_idle: int = 16
    grace_s: float = 5.0
    start_timeout_s: float = 60.0
    patience_s: float = PATIENCE_S
    gpu_devices: tuple[str, ...] = ()

    @property
    def overrides(self) -> dict[str, str]:
        return dict(self.env)


def due(worker: Worker, config: PoolConfig, now: float) -> tuple[float, Fate | None]:
    """When to look at a worker again, and what to do with it then: end it so, or dismiss it (``None``).

    Infinite where time alone changes nothing.
    """
    if worker.fate is not None:
        return math.inf, None
    if worker.leaving is not None:
        return worker.leaving, Fate("cancelled", "it did not leave when told to")
    if not worker.pid:
        detail = f"it had not reported after {config.start_timeout_s:g} s"
        return worker.born + config.start_timeout_s, Fate("start", detail)
    if worker.bundle is not None:
        timeout_s = worker.bundle.timeout_s
        if timeout_s is None:
            return math.inf, None
        reading = worker.reading()
        since = reading.instant if reading.running else now
        return since + timeout_s, Fate("timeout", f"an item ran longer than {timeout_s:g} s", reading.started - 1)
    return (worker.idle_since + config.idle_s, None) if worker.lease is None else (math.inf, None)


def idle(workers: Iterable[Worker]) -> list[Worker]:
    """Workers that nobody has, the one used least recently first."""
    return sorted((worker for worker in workers if worker.idle), key=lambda worker: worker.idle_since)


def check(size: Size, machine_mb: float) -> None:
    """That a worker of this size can be had on this machine, GPUs aside.

    Raises:
        InvalidValue: It can't.
    """
    if size.hardware != "cpu" and not size.gpu:
        raise InvalidValue("size", str(size), "hardware 'cpu', or a share of a GPU, on local worker processes")
    if size.memory_mb > machine_mb:
        raise InvalidValue("size.memory_mb", size.memory_mb, f"at most {machine_mb:.0f} MB, this machine's")


def fitting(workers: Iterable[Worker], size: Size) -> Worker | None:
    """The idle worker to take for ``size``: one of that size used last, else one that can become it.

    A worker changes its size by cores, thread limits and memory limit. One that holds more memory than ``size`` leaves
    room for can't.
    """
    warm = idle(workers)
    for worker in reversed(warm):
        if worker.size == size:
            return worker
    for worker in reversed(warm):
        if worker.resident_mb + HEADROOM_MB <= max(float(size.memory_mb), worker.born_mb + HEADROOM_MB):
            return worker
    return None


def in_the_way(workers: Iterable[Worker], size: Size, memory_mb: float) -> list[Worker]:
    """Idle workers to dismiss so that memory suffices for one more of ``size``: least recently used first."""
    workers = list(workers)
    warm, going = idle(workers), []
    leased = sum(worker.limit_mb or worker.size.memory_mb for worker in workers if worker.lease is not None)
    while warm and leased + sum(worker.resident_mb for worker in warm) + size.memory_mb > memory_mb:
        going.append(warm.pop(0))
    return going

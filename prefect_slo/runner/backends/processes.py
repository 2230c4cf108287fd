"""Worker processes on this machine: isolated, sized, watched, and warm from one flow run to the next.

A worker has ⌈vCPUs⌉ cores of its own (where the system has affinity), native thread pools held to as many threads, and
a cap on resident memory. A fraction of a vCPU is accounted for by the ledger but not enforced: a worker alone on its
core may use all of it (a quota would take a control group that the system lets us write, and that its own process had
to leave). It is ended when an item overruns, outgrows its memory or is cancelled, and with its parent. One with a share
of a GPU sees that device alone, is started for its lease and ends with it, as a process keeps what it has taken there.
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from prefect_slo.errors import InvalidValue
from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Bundle, Capabilities, Sink
from prefect_slo.runner.local.gpu_ledger import GpuLedger
from prefect_slo.runner.local.keeping import PATIENCE_S, PoolConfig
from prefect_slo.runner.local.launch import Forker, StartMethod
from prefect_slo.runner.local.ledger import Ledger
from prefect_slo.runner.local.limits import HAS_AFFINITY, machine_memory_mb
from prefect_slo.runner.local.member import Lease
from prefect_slo.runner.local.pool import WorkerPool
from prefect_slo.runner.local.setup import Surroundings

_KEPT = 256  # leases that are over and still known, before they are forgotten
_owners = itertools.count(1)
_pools_lock = threading.Lock()
_pools: list[WorkerPool] = []
_shared: dict[PoolConfig, WorkerPool] = {}


class ProcessBackend:
    """Runs bundles in worker processes of this machine.

    Args:
        env: Environment of workers beyond the parent's, e.g. ``{"PREFECT_API_URL": …}``. Also wins over thread limits.
        preload: Modules that workers find imported, so that none has to wait for them.
        idle_s: A worker unused for this long is ended.
        max_idle: Workers kept warm at once; by default twice the vCPUs, at least 4.
        grace_s: How long workers may take to end when told to.
        start: How workers start; see ``PoolConfig``.
        patience_s: How long a lease waits for its share of the machine before it goes without one.
        ledger: The machine's vCPUs; by default the user's ledger of this machine.
        gpu_devices: GPUs by name and memory (``"0:16384"``), in place of those that ``nvidia-smi`` lists.
        gpus: The machine's GPUs; by default the user's ledger of these.
        zygote: One that is there already, with ``preload``.

    ``ProcessBackend.shared(...)`` takes the same arguments and shares workers with every other backend of this process
    that was made with them; lease ids and program keys stay apart.
    """

    def __init__(
        self,
        *,
        env: Mapping[str, str] | None = None,
        preload: Sequence[str] = (),
        idle_s: float = 60.0,
        max_idle: int | None = None,
        grace_s: float = 5.0,
        start: StartMethod = "auto",
        patience_s: float = PATIENCE_S,
        ledger: Ledger | None = None,
        gpu_devices: Sequence[str] = (),
        gpus: GpuLedger | None = None,
        zygote: Forker | None = None,
        _pool: WorkerPool | None = None,
    ) -> None:
        if _pool is None:
            ledger = ledger or Ledger()
            config = _config(env, preload, idle_s, max_idle, grace_s, start, patience_s, ledger, gpu_devices)
            _pool = _new_pool(config, ledger, gpus, zygote)
            self._private = True
        else:
            self._private = False
        self._pool, self._owner = _pool, str(next(_owners))
        self._leases: dict[int, Lease] = {}
        self._lock = threading.Lock()

    @classmethod
    def shared(
        cls,
        *,
        env: Mapping[str, str] | None = None,
        preload: Sequence[str] = (),
        idle_s: float = 60.0,
        max_idle: int | None = None,
        grace_s: float = 5.0,
        start: StartMethod = "auto",
        patience_s: float = PATIENCE_S,
        gpu_devices: Sequence[str] = (),
    ) -> ProcessBackend:
        """A backend on the process' own workers: they stay warm after its ``shutdown``, for ``idle_s``."""
        with _pools_lock:
            ledger = Ledger()
            config = _config(env, preload, idle_s, max_idle, grace_s, start, patience_s, ledger, gpu_devices)
            pool = _shared.get(config)
            if pool is None:
                pool = _shared[config] = WorkerPool(config, ledger)
                _pools.append(pool)
        return cls(_pool=pool)

    @staticmethod
    def available() -> bool:
        """Whether this system can run it: Unix sockets, sessions, an interpreter to start."""
        return sys.platform != "win32" and bool(sys.executable)

    def capabilities(self) -> Capabilities:
        """What it can promise on this machine."""
        return Capabilities(
            isolated=True,
            hard_timeouts=True,
            memory_limits=True,
            vcpu_limits=HAS_AFFINITY,
            vcpus=self._pool.ledger.capacity,
            memory_mb=machine_memory_mb(),
        )

    def open(self, lease: int, size: Size, sink: Sink) -> None:
        """Ask for a worker. It waits for its share of the machine, behind those who asked before."""
        asked = Lease(
            lease, size, sink, self._owner, Surroundings.current(self._pool.config.overrides), time.monotonic()
        )
        with self._lock:
            if len(self._leases) > _KEPT:
                self._leases = {id_: known for id_, known in self._leases.items() if not known.done}
            self._leases[lease] = asked
        self._pool.open(asked)

    def submit(self, lease: int, bundle: Bundle) -> None:
        """Hand a bundle to an opened, idle lease. Nothing happens where it was lost meanwhile: see ``Lost.bundle``."""
        self._pool.submit(self._find(lease), bundle)

    def cancel(self, lease: int) -> None:
        """End what the lease runs, by SIGKILL to the worker and its process group."""
        self._pool.cancel(self._find(lease))

    def close(self, lease: int) -> None:
        """Give the lease back; its worker stays warm for the next of its size."""
        with self._lock:
            closed = self._leases.pop(lease, None)
        if closed is not None:
            self._pool.close(closed)

    def shutdown(self) -> None:
        """End every lease and wait for that; also every worker, unless they are shared."""
        with self._lock:
            leases, self._leases = list(self._leases.values()), {}
        if self._private:
            self._pool.stop()
            return
        for lease in leases:
            self._pool.cancel(lease, "the backend was shut down")
        self._pool.settle(leases, self._pool.config.grace_s + 30)

    def _find(self, lease: int) -> Lease:
        try:
            return self._leases[lease]
        except KeyError:
            raise InvalidValue("lease", lease, "a lease that was opened and not closed") from None

    @property
    def pids(self) -> tuple[int, ...]:
        """Worker processes that run or idle now."""
        return self._pool.pids()

    @property
    def stopped(self) -> bool:
        """Whether its workers have been ended for good, by ``shutdown`` or by ``shutdown_all``."""
        return self._pool.stopped

    @staticmethod
    def shutdown_all() -> None:
        """End the workers of every backend of this process, shared ones too."""
        with _pools_lock:
            pools = list(_pools)
            _pools.clear()
            _shared.clear()
        for pool in pools:
            pool.stop()


def _config(
    env: Mapping[str, str] | None,
    preload: Sequence[str],
    idle_s: float,
    max_idle: int | None,
    grace_s: float,
    start: StartMethod,
    patience_s: float,
    ledger: Ledger,
    gpu_devices: Sequence[str],
) -> PoolConfig:
    if max_idle is None:
        max_idle = max(4, int(2 * ledger.capacity))
    return PoolConfig(
        env=tuple(sorted((env or {}).items())),
        preload=tuple(preload),
        start=start,
        idle_s=idle_s,
        max_idle=max_idle,
        grace_s=grace_s,
        patience_s=patience_s,
        gpu_devices=tuple(gpu_devices),
    )


def _new_pool(config: PoolConfig, ledger: Ledger, gpus: GpuLedger | None, zygote: Forker | None) -> WorkerPool:
    pool = WorkerPool(config, ledger, gpus, zygote)
    with _pools_lock:
        _pools[:] = [known for known in _pools if not known.stopped]
        _pools.append(pool)
    return pool


def _forget_after_fork() -> None:
    """A fork of this process has no business with its workers, and none of its threads."""
    global _pools_lock
    _pools_lock = threading.Lock()
    _pools.clear()
    _shared.clear()


atexit.register(ProcessBackend.shutdown_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)

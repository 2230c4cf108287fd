"""What a worker may use: cores, threads of native libraries, and what the machine has."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMEXPR_MAX_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "BLIS_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "LOKY_MAX_CPU_COUNT",
)
HAS_AFFINITY = hasattr(os, "sched_setaffinity")


def threads_of(vcpus: float) -> int:
    """Threads that native libraries may use on ``vcpus``: ⌈vcpus⌉."""
    return max(1, math.ceil(vcpus - 1e-9))


def thread_environment(vcpus: float) -> dict[str, str]:
    """Environment variables that hold native libraries to ``vcpus``; they read them when they are loaded."""
    return dict.fromkeys(THREAD_VARIABLES, str(threads_of(vcpus)))


def limit_loaded_libraries(threads: int) -> None:
    """Hold thread pools that are loaded already to ``threads``; those loaded later follow the environment."""
    if not {"numpy", "scipy", "torch", "sklearn"}.isdisjoint(sys.modules):
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads)


def own_cores() -> tuple[int, ...]:
    """Cores this process may run on."""
    if HAS_AFFINITY:
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def machine_vcpus() -> float:
    """vCPUs this process may use: its cores, or the quota of its control group where that is less."""
    return min(float(len(own_cores())), _cgroup_quota())


def machine_memory_mb() -> float:
    """Memory this process may use, in MB: the machine's, or the limit of its control group where that is less."""
    total = float(psutil.virtual_memory().total)
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, float(Path(name).read_text()))
    return total / 2**20


def pin(pid: int, cores: Iterable[int]) -> bool:
    """Bind every thread of process ``pid`` (0: this one) to ``cores``; ``False`` where the system can't or won't."""
    if not HAS_AFFINITY:
        return False
    try:
        threads = [int(name) for name in os.listdir(f"/proc/{pid or 'self'}/task")]
    except OSError:
        threads = [pid]
    pinned = False
    for thread in threads:
        with contextlib.suppress(OSError):  # a thread that has just ended, or a core that was taken away
            os.sched_setaffinity(thread, cores)
            pinned = True
    return pinned


def _cgroup_quota() -> float:
    """CPU quota of the container's control group, in vCPUs; infinite where there is none."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float(quota) / float(period)  # "max" is not a number: no quota
    with contextlib.suppress(OSError, ValueError):
        first = Path("/sys/fs/cgroup/cpu")
        quota, period = ((first / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    return math.inf

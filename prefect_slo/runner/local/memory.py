"""Resident memory of a process and of all it has started, watched from outside.

A limit on address space (``RLIMIT_AS``) would count what is mapped and never touched, and fail inside arbitrary native
code; watching resident memory ends the worker cleanly instead. Growth between two looks (50 ms) is not caught in time.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from prefect_slo.runner.local.cgroup import MemoryGroup

_PAGE_MB = (os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096) / 2**20
_PROC = os.path.exists("/proc/self/statm")


def resident_mb(pid: int) -> float:
    """Resident memory of process ``pid`` and its descendants, in MB; 0 when it is gone.

    Pages that a process shares with its fork count in both, so a sum is an upper bound; see ``proportional_mb``.
    """
    if not _PROC:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
            return sum(float(member.memory_info().rss) for member in family) / 2**20
        return 0.0
    return sum(_resident_of(member) for member in family_of(pid))


def proportional_mb(pid: int) -> float:
    """The same with every shared page counted once (Linux; slow, so only to confirm)."""
    total = 0.0
    for member in family_of(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            total += _resident_of(member)
    return total


def family_of(pid: int) -> list[int]:
    """``pid`` and its descendants (Linux)."""
    family, unseen = [pid], [pid]
    while unseen:
        member = unseen.pop()
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{member}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{member}/task/{thread}/children", "rb") as file:
                    children = [int(child) for child in file.read().split()]
                    family += children
                    unseen += children
    return family


def _resident_of(pid: int) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/statm", "rb", buffering=0) as file:
        return int(file.read().split()[1]) * _PAGE_MB
    return 0.0


class MemoryWatch:
    """A thread that looks at busy workers and says which exceed their limit.

    Args:
        busy: The workers to look at now: ``(token, pid, limit in MB, control group)``; empty lets the thread rest.
        seen: Told ``(token, MB)`` at each look.
        exceeded: Told ``(token, MB)`` when a worker is over its limit.
        interval_s: Time between two looks.
    """

    def __init__(
        self,
        busy: Callable[[], Iterable[tuple[int, int, float, MemoryGroup | None]]],
        seen: Callable[[int, float], None],
        exceeded: Callable[[int, float], None],
        *,
        interval_s: float = 0.05,
    ) -> None:
        self._busy, self._seen, self._exceeded, self._interval_s = busy, seen, exceeded, interval_s
        self._work, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="prefect-slo-memory", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something to look at."""
        if not self._work.is_set():
            self._work.set()

    def close(self) -> None:
        self._stop.set()
        self._work.set()
        self._thread.join(5)

    def _watch(self) -> None:
        while True:
            self._work.wait()
            if self._stop.is_set():
                return
            self._work.clear()
            while workers := list(self._busy()):
                for token, pid, limit_mb, group in workers:
                    self._look(token, pid, limit_mb, group)
                if self._stop.wait(self._interval_s):
                    return

    def _look(self, token: int, pid: int, limit_mb: float, group: MemoryGroup | None) -> None:
        used = resident_mb(pid)
        if group is not None and group.over:  # what it holds besides resident memory counts, too: files in memory
            used = max(used, limit_mb + 1)
        elif used > limit_mb and _PROC and used > _resident_of(pid):
            used = proportional_mb(pid)
        self._seen(token, used)
        if used > limit_mb:
            self._exceeded(token, used)

"""A sandbox's share of the CPU, really kept: by a control group's quota where one can be made, else by stopping it.

The start of a sandbox has no limit, as on Lambda; it begins when the sandbox first asks for work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from functools import cache
from itertools import count
from pathlib import Path
from typing import Protocol

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 20_000
"""Quotas are kept over so long: a share of 0.07 runs for 1.4 ms of it, just above what the kernel takes."""

TICK_S = 0.004
_PREFIX = "prefect-slo-lambda-"
_CPU_CLOCK = 2  # Linux: the clock of another process's CPU time, in the low bits of its clock id
_numbers = count(1)


class CpuLimit(Protocol):
    """Keeps one process to its share."""

    def add(self, pid: int) -> None:
        """The process; what it starts from now on is in it, too, where the kernel keeps the limit."""
        ...

    def begin(self) -> None:
        """From now on it is kept."""
        ...

    def close(self) -> None:
        """The process has ended."""
        ...


def cpu_limit(vcpus: float) -> CpuLimit:
    """A limit of so many vCPUs."""
    place = _place()
    return Quota(place, vcpus) if place is not None else Duty(vcpus)


class Quota:
    """A control group with a quota of CPU time; both versions.

    Args:
        parent: Folder in which groups can be made.
        vcpus: The limit.
    """

    def __init__(self, parent: Path, vcpus: float) -> None:
        self._path = parent / f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
        self._path.mkdir()
        self._quota_us = max(int(vcpus * PERIOD_US), 1000)

    def add(self, pid: int) -> None:
        """Put it in the group."""
        with contextlib.suppress(ProcessLookupError):
            (self._path / "cgroup.procs").write_text(str(pid))

    def begin(self) -> None:
        """Set the quota."""
        if (self._path / "cpu.max").exists():
            (self._path / "cpu.max").write_text(f"{self._quota_us} {PERIOD_US}")
            return
        (self._path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (self._path / "cpu.cfs_quota_us").write_text(str(self._quota_us))

    def close(self) -> None:
        """Remove the group; what of its process group still dies keeps it for a moment."""
        for _ in range(50):
            try:
                self._path.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(TICK_S)
            else:
                return


class Duty:
    """Stops a process whenever it is ahead of its share, and lets it go on once it isn't: a bucket of CPU time.

    What a handler starts beside its own process isn't counted.

    Args:
        vcpus: The limit.
    """

    def __init__(self, vcpus: float) -> None:
        self._vcpus, self._pid = vcpus, 0
        self._begun, self._ended = threading.Event(), threading.Event()

    def add(self, pid: int) -> None:
        """Watch it from a thread."""
        self._pid = pid
        threading.Thread(target=self._govern, name="prefect-slo-duty", daemon=True).start()

    def begin(self) -> None:
        """Count from here on."""
        self._begun.set()

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        self._begun.set()

    def _govern(self) -> None:
        self._begun.wait()
        left_s, looked, used = 0.0, time.monotonic(), self._cpu_s()
        stopped = False
        while not self._ended.wait(TICK_S):
            now, cpu = time.monotonic(), self._cpu_s()
            left_s = min(left_s + (now - looked) * self._vcpus, self._vcpus * PERIOD_US / 1e6) - (cpu - used)
            looked, used = now, cpu
            if (left_s < 0) != stopped:
                stopped = not stopped
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGSTOP if stopped else signal.SIGCONT)

    def _cpu_s(self) -> float:
        try:
            return time.clock_gettime((~self._pid << 3) | _CPU_CLOCK)
        except OSError:
            return 0.0


@cache
def _place() -> Path | None:
    """The folder in which groups with a quota can be made: one is made to see. What dead processes left is removed."""
    for parent in _candidates():
        trial = parent / f"{_PREFIX}{os.getpid()}-0"
        try:
            trial.mkdir()
        except OSError:
            continue
        try:
            (trial / ("cpu.max" if (trial / "cpu.max").exists() else "cpu.cfs_quota_us")).read_text()
        except OSError:
            continue
        else:
            _sweep(parent)
            return parent
        finally:
            with contextlib.suppress(OSError):
                trial.rmdir()
    return None


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):  # something in it still lives
                path.rmdir()


def _candidates() -> list[Path]:
    """This process's own groups that may divide CPU time."""
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            if "cpu" in controllers.split(","):
                found += [ROOT / controllers / own.lstrip("/"), ROOT / "cpu" / own.lstrip("/")]
            elif not controllers:
                found.append(ROOT / own.lstrip("/"))
    return [path for path in found if path.is_dir()]

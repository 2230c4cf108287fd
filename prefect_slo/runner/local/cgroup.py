"""A hard cap on a worker's memory by a control group, where this process may make one (Linux, both versions).

The watch of ``memory`` looks every 50 ms; what grows faster than that the kernel stops. In the first version it holds
the allocation back until the watch has ended the whole worker (it would kill one process of it, perhaps a child that
nobody misses); in the second it ends all of the group at once.
A group counts what its processes allocate once they are in it: pages that a worker shares with its zygote stay out.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

ROOT = Path("/sys/fs/cgroup")
_PREFIX = "prefect-slo-"
_SLACK, _SLACK_MB = 1.1, 64
"""The kernel's cap lies above the watch's, which sees what grows slowly first (file caches count)."""


@dataclass(frozen=True)
class _Files:
    """What a version of control groups calls its files."""

    limits: tuple[str, ...]
    settings: tuple[tuple[str, int], ...]
    events: str
    over: str


_FIRST = _Files(
    ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    (("memory.oom_control", 1),),
    "memory.oom_control",
    "under_oom",
)
_SECOND = _Files(("memory.max",), (("memory.swap.max", 0), ("memory.oom.group", 1)), "memory.events", "oom_kill")


class MemoryGroup:
    """The control group of one worker.

    Args:
        path: Its folder, which exists.
        files: What its version calls its files.
    """

    def __init__(self, path: Path, files: _Files) -> None:
        self.path, self._files = path, files

    @classmethod
    def make(cls, token: int) -> MemoryGroup | None:
        """A group for worker ``token`` of this process; ``None`` where groups can't be made."""
        place = _place()
        if place is None:
            return None
        parent, files = place
        path = parent / f"{_PREFIX}{os.getpid()}-{token}"
        try:
            path.mkdir(exist_ok=True)
        except OSError:
            return None
        if not (path / files.limits[0]).exists():  # the parent doesn't hand the memory controller down
            _remove(path)
            return None
        return cls(path, files)

    def add(self, pid: int) -> bool:
        """Put a process in, and with it what it starts from now on; whether that worked."""
        return self._write("cgroup.procs", pid)

    def cap(self, limit_mb: float) -> bool:
        """Have whatever allocates beyond ``limit_mb`` (and some slack) stopped; whether that worked."""
        for name, value in self._files.settings:
            self._write(name, value)
        most = int((limit_mb * _SLACK + _SLACK_MB) * 2**20)
        done = [self._write(name, most) for name in self._files.limits]
        if not done[0]:  # the limit that includes swap must never be the lower one: it is raised first
            done = [self._write(name, most) for name in reversed(self._files.limits)][::-1]
        return done[0]

    @property
    def over(self) -> bool:
        """Whether the kernel holds something in it back, or has ended it, for its memory."""
        lines = _text(self.path / self._files.events).splitlines()
        counts = {name: value for name, _, value in (line.partition(" ") for line in lines)}
        return counts.get(self._files.over, "0") != "0"

    def close(self) -> None:
        """Remove it, once its processes have ended."""
        _remove(self.path)

    def _write(self, name: str, value: int) -> bool:
        file = self.path / name
        try:
            if file.exists():
                file.write_text(str(value))
                return True
        except OSError:
            pass
        return False


@cache
def _place() -> tuple[Path, _Files] | None:
    """The folder in which groups can be made, and what files are called there; what dead processes left is removed."""
    for parent, files in _candidates():
        if os.access(parent, os.W_OK) and (parent / "cgroup.procs").exists():
            _sweep(parent)
            return parent, files
    return None


def _candidates() -> list[tuple[Path, _Files]]:
    """This process's own groups that may count memory."""
    found: list[tuple[Path, _Files]] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            if "memory" in controllers.split(","):
                found += [(ROOT / "memory" / own.lstrip("/"), _FIRST), (ROOT / "memory", _FIRST)]
            elif not controllers:
                parent = ROOT / own.lstrip("/")
                handed_down = _text(parent / "cgroup.subtree_control").split()
                found += [(parent, _SECOND)] if "memory" in handed_down else []
    return [(path, files) for path, files in found if path.is_dir()]


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # something in it still lives: a later process sweeps it up
        path.rmdir()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

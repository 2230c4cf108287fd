"""Books of what this machine holds, shared by everything of one user that runs on it: who holds what, who waits.

A book is a small file under a lock (``flock``). An entry names its holder by process id and start time, so the share
of a process that died is taken back by whoever waits next. Where no file can be written, only this process is accounted
for. Other users of the machine have books of their own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

_PROC = os.path.exists("/proc/self/stat")


@dataclass
class Entries:
    """What a book holds.

    Attributes:
        next: Number of the next claim.
        held: Granted claims: id, process id and start time of the holder, and what the ledger adds.
        queue: Claims that wait, first come first: the same.
    """

    next: int = 1
    held: list[Any] = field(default_factory=list)
    queue: list[Any] = field(default_factory=list)


class Book(Protocol):
    """Where entries are kept."""

    def edit(self) -> contextlib.AbstractContextManager[Entries]:
        """The entries, for one holder at a time; changes are kept."""
        ...


class MemoryBook:
    """Entries of this process alone."""

    def __init__(self) -> None:
        self._lock, self._entries = threading.Lock(), Entries()

    @contextlib.contextmanager
    def edit(self) -> Iterator[Entries]:
        with self._lock:
            yield self._entries


class FileBook:
    """Entries in a file.

    Args:
        path: The file; made where it doesn't exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self.edit():
            pass

    @contextlib.contextmanager
    def edit(self) -> Iterator[Entries]:
        # Opened anew each time (some 10 µs): a cleaner of temporary files may have removed it.
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            before = os.read(fd, 1 << 20)
            entries = self._parse(before)
            yield entries
            after = json.dumps([entries.next, entries.held, entries.queue], separators=(",", ":")).encode() + b"\n"
            if after != before:
                os.pwrite(fd, after, 0)
                os.ftruncate(fd, len(after))
        finally:
            os.close(fd)

    def _parse(self, text: bytes) -> Entries:
        if not text:
            return Entries()
        try:
            return Entries(*json.loads(text.split(b"\n", 1)[0]))
        except (ValueError, TypeError):
            logger.warning("The ledger %s could not be read; it is begun anew.", self._path)
            return Entries()


def machine_book(kind: str) -> Book:
    """The user's book of what this machine has of a kind; this process' own where no file can be written."""
    try:
        return FileBook(_directory() / f"{kind}-{_machine()}.json")
    except OSError:
        return _OWN.setdefault(kind, MemoryBook())


_OWN: dict[str, MemoryBook] = {}


def _directory() -> Path:
    """A directory of this user alone, for the time the machine is up."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(runtime) / "prefect-slo" if runtime else Path(tempfile.gettempdir()) / f"prefect-slo-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to someone else")
    return path


def _machine() -> str:
    """Names this boot and this space of process ids: ids of another mean nothing here."""
    boot, space = "boot", "pid"
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return f"{boot}-{space}"


def identity(pid: int) -> tuple[int, float]:
    """Process id and start time, which together are never used again; the time is -1 when there is no such process."""
    return _SELF if pid == _SELF[0] else (pid, _start(pid))


def _start(pid: int) -> float:
    """When a process started, in a unit that never drifts with the wall clock where the system has one."""
    if _PROC:
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return -1.0
        return -1.0 if fields[0] in (b"Z", b"X") else float(fields[19])
    try:
        return round(float(psutil.Process(pid).create_time()), 2)
    except psutil.Error:
        return -1.0


_SELF: tuple[int, float] = (0, 0.0)


def _remember_self() -> None:
    global _SELF
    _SELF = (os.getpid(), _start(os.getpid()))


_remember_self()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_self)


def bury(entries: Entries) -> None:
    """Take back what dead processes held or waited for."""
    holders = {(entry[1], entry[2]) for entry in (*entries.held, *entries.queue)}
    dead = {holder for holder in holders if identity(holder[0])[1] != holder[1]}
    if dead:
        entries.held = [entry for entry in entries.held if (entry[1], entry[2]) not in dead]
        entries.queue = [entry for entry in entries.queue if (entry[1], entry[2]) not in dead]

"""The machine's vCPUs, shared by everything of one user that runs on it: who holds which cores, who waits.

The book is a small file under a lock (``flock``). An entry names its holder by process id and start time, so the share
of a process that died is taken back by whoever waits next. Where no file can be written, only this process is accounted
for. Other users of the machine have books of their own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from prefect_slo.errors import InvalidValue
from prefect_slo.runner.local.limits import machine_vcpus, own_cores
from prefect_slo.units import positive

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

_SLACK = 1e-9
_PROC = os.path.exists("/proc/self/stat")


@dataclass
class Claim:
    """A share of the machine, granted or waited for.

    Attributes:
        id: Its number in the book; from 1.
        vcpus: How much.
        cores: Cores granted; empty while it waits.
        granted: Whether it is.
    """

    id: int
    vcpus: float
    cores: tuple[int, ...] = ()
    granted: bool = False

    @classmethod
    def unaccounted(cls, vcpus: float) -> Claim:
        """A share that no book knows of."""
        return cls(0, vcpus, granted=True)


@dataclass
class Entries:
    """What a book holds.

    Attributes:
        next: Number of the next claim.
        held: Granted claims: ``[id, pid, start, vcpus, cores]``.
        queue: Claims that wait, first come first: ``[id, pid, start]``.
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
            logger.warning("The vCPU ledger %s could not be read; it is begun anew.", self._path)
            return Entries()


class Ledger:
    """Grants shares of the machine, first come first served.

    Args:
        book: Where entries are kept; by default the user's file, or memory where that can't be written.
        cores: Cores that may be granted; by default those of this process.
        vcpus: How many of them at once; by default all, or the quota of the control group.
    """

    def __init__(
        self, book: Book | None = None, *, cores: Sequence[int] | None = None, vcpus: float | None = None
    ) -> None:
        self._book = default_book() if book is None else book
        self._cores = tuple(own_cores() if cores is None else cores)
        if not self._cores:
            raise InvalidValue("ledger.cores", self._cores, "at least one core")
        limit = machine_vcpus() if vcpus is None else positive(vcpus, "ledger.vcpus")
        self.capacity = min(limit, float(len(self._cores)))

    def claim(self, vcpus: float) -> Claim:
        """Ask for ``vcpus``: granted at once when nobody waits and they are free, else queued.

        Raises:
            InvalidValue: More than the machine has, so that waiting would never end.
        """
        if positive(vcpus, "vcpus") > self.capacity + _SLACK:
            raise InvalidValue("vcpus", vcpus, f"at most {self.capacity:g}, which is what this machine offers")
        with self._book.edit() as entries:
            claim = Claim(entries.next, vcpus)
            entries.next += 1
            if entries.queue or not self._grant(entries, claim):
                entries.queue.append([claim.id, *_identity(os.getpid())])
                self._advance(entries, claim)
            return claim

    def retry(self, claim: Claim) -> bool:
        """Whether a claim that waited is granted now. Meant to be asked every 20 ms or so."""
        if not claim.granted:
            with self._book.edit() as entries:
                if all(waiting[0] != claim.id for waiting in entries.queue):  # the book was begun anew
                    entries.next = max(entries.next, claim.id + 1)
                    entries.queue.append([claim.id, *_identity(os.getpid())])
                self._advance(entries, claim)
        return claim.granted

    def release(self, claim: Claim) -> None:
        """Give a share back, or stop waiting for it."""
        if not claim.id:
            return
        with self._book.edit() as entries:
            mine = [claim.id, *_identity(os.getpid())]
            entries.held = [entry for entry in entries.held if entry[:3] != mine]
            entries.queue = [entry for entry in entries.queue if entry[:3] != mine]
        claim.cores, claim.granted = (), False

    def used(self) -> float:
        """vCPUs held now on the cores of this ledger, by processes that live."""
        with self._book.edit() as entries:
            _bury(entries)
            return sum(self._loads(entries).values())

    def _advance(self, entries: Entries, claim: Claim) -> None:
        """Grant ``claim`` if it has come to the head of the queue and fits, once the dead are out of the way."""
        _bury(entries)
        if entries.queue[0][0] == claim.id and self._grant(entries, claim):
            del entries.queue[0]

    def _grant(self, entries: Entries, claim: Claim) -> bool:
        loads = self._loads(entries)
        if sum(loads.values()) + claim.vcpus > self.capacity + _SLACK:
            return False
        claim.cores, claim.granted = place(loads, claim.vcpus), True
        entries.held.append([claim.id, *_identity(os.getpid()), claim.vcpus, list(claim.cores)])
        return True

    def _loads(self, entries: Entries) -> dict[int, float]:
        loads = dict.fromkeys(self._cores, 0.0)
        for _, _, _, vcpus, cores in entries.held:
            for index, core in enumerate(cores):
                if core in loads:
                    loads[core] += min(1.0, vcpus - index)
        return loads


def place(loads: Mapping[int, float], vcpus: float) -> tuple[int, ...]:
    """⌈vcpus⌉ cores for a claim: whole vCPUs on the emptiest cores, a fraction on the fullest core that still takes it.

    Args:
        loads: vCPUs held on each core already.
        vcpus: How much to place.
    """
    whole = math.floor(vcpus + _SLACK)
    fraction = vcpus - whole
    by_load = sorted(loads, key=lambda core: (loads[core], core))
    cores, rest = by_load[:whole], by_load[whole:]
    if fraction > _SLACK:
        fitting = [core for core in rest if loads[core] + fraction <= 1 + _SLACK]
        cores.append(max(fitting, key=lambda core: (loads[core], -core)) if fitting else rest[0])
    return tuple(cores)


def default_book() -> Book:
    """The user's book of this machine; the book of this process where no file can be written."""
    try:
        return FileBook(_directory() / f"vcpus-{_machine()}.json")
    except OSError:
        return _OWN_BOOK


_OWN_BOOK = MemoryBook()


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


def _identity(pid: int) -> tuple[int, float]:
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


def _bury(entries: Entries) -> None:
    """Take back what dead processes held or waited for."""
    holders = {(entry[1], entry[2]) for entry in (*entries.held, *entries.queue)}
    dead = {holder for holder in holders if _identity(holder[0])[1] != holder[1]}
    if dead:
        entries.held = [entry for entry in entries.held if (entry[1], entry[2]) not in dead]
        entries.queue = [entry for entry in entries.queue if (entry[1], entry[2]) not in dead]

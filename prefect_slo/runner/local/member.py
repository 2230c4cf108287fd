"""One worker of a pool and one lease on it, as the parent sees them."""

from __future__ import annotations

import logging
import os
import socket
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from prefect_slo.control.events import LossReason
from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import (
    Bundle,
    Chatter,
    Finished,
    ItemReport,
    Lost,
    Outcome,
    Progress,
    Report,
    Sink,
)
from prefect_slo.runner.local.cgroup import MemoryGroup
from prefect_slo.runner.local.gpu_ledger import GpuClaim
from prefect_slo.runner.local.gpus import Sharing
from prefect_slo.runner.local.ledger import Claim
from prefect_slo.runner.local.limits import pin
from prefect_slo.runner.local.page import Page, Reading
from prefect_slo.runner.local.setup import Surroundings
from prefect_slo.runner.local.wire import Backlog, Decoder, encode, lift, lift_all

logger = logging.getLogger(__name__)

_PROGRAMS = 32  # that a worker keeps; a flow run has one for each of its tasks

HEADROOM_MB = 64
"""Memory that a worker has above what it held at birth, whatever its size says."""


@dataclass(eq=False)
class Lease:
    """A worker that somebody asked for.

    Attributes:
        id: Chosen by whoever asked, unique within ``sink``.
        size: What it may use.
        sink: Where its reports go.
        owner: Who asked: keeps program keys of different owners apart.
        surroundings: Where it asked from.
        asked: When (monotonic).
        claim: Share of the machine, from the moment it is asked for.
        gpus: Share of its GPUs, likewise; ``None`` for a size without.
        sharing: What keeps it apart from others on its GPU.
        seated: When it had its share of GPUs and got in line for its share of the machine (monotonic).
        granted: When the share was granted (monotonic).
        worker: Its worker, from the moment one is chosen or started.
        done: It is closed or lost.
    """

    id: int
    size: Size
    sink: Sink
    owner: str
    surroundings: Surroundings
    asked: float
    claim: Claim | None = None
    gpus: GpuClaim | None = None
    sharing: Sharing = "turns"
    seated: float = 0.0
    granted: float = 0.0
    worker: Worker | None = None
    done: bool = False


@dataclass(frozen=True)
class Fate:
    """Why a worker is being ended, decided before it is.

    Attributes:
        reason: For ``Lost``.
        detail: For ``Lost``.
        index: Which item of its bundle brought it about, for a timeout.
    """

    reason: LossReason
    detail: str
    index: int | None = None


@dataclass(eq=False)
class Worker:
    """A worker process, from being asked for to being reaped.

    Attributes:
        token: Its number in the pool.
        size: What it is limited to.
        sock: Our end of its socket, not blocking.
        page: What it publishes.
        born: When it was asked for (monotonic).
        surroundings: What it stands in.
        cores: What it is bound to.
        pid: Its process, once it has reported.
        born_mb: Its memory when it reported first.
        resident_mb: Its memory when it reported last.
        limit_mb: Memory it may hold.
        group: Has the kernel hold it to that, where it can be had.
        lease: Who has it.
        gpus: Share of GPUs that is its own until it has ended: it holds memory there as long as it lives.
        bundle: What it runs.
        serial: Number of its bundle.
        before: Number of the last bundle of the lease before this one.
        peak_mb: Most memory seen from outside over its bundle.
        fate: Why it is being ended, if it is.
        leaving: It was told goodbye, and until when it may take (monotonic).
        idle_since: When it was given back (monotonic).
        hung_up: Its end of the socket is closed.
    """

    token: int
    size: Size
    sock: socket.socket
    page: Page
    born: float
    surroundings: Surroundings
    cores: tuple[int, ...]
    pid: int = 0
    born_mb: float = 0.0
    resident_mb: float = 0.0
    limit_mb: float = 0.0
    group: MemoryGroup | None = None
    lease: Lease | None = None
    gpus: GpuClaim | None = None
    bundle: Bundle | None = None
    serial: int = 0
    before: int = 0
    peak_mb: float = 0.0
    fate: Fate | None = None
    leaving: float | None = None
    idle_since: float = 0.0
    hung_up: bool = False
    decoder: Decoder = field(default_factory=Decoder)
    backlog: Backlog = field(default_factory=Backlog)
    _programs: OrderedDict[str, None] = field(default_factory=OrderedDict)

    @property
    def idle(self) -> bool:
        """Whether it waits for its next lease."""
        return self.lease is None and self.pid > 0 and self.leaving is None and self.fate is None

    @property
    def bloated(self) -> bool:
        """Whether more than half of what it may use is taken before anything runs: not fair to its next lease."""
        return self.resident_mb - self.born_mb > (self.limit_mb - self.born_mb) / 2

    def receive(self) -> list[list[tuple[Any, ...]]] | None:
        """Frames of records that it has sent; ``None`` where no more will come.

        Raises:
            BlockingIOError: There are none for now.
        """
        try:
            return self.decoder.receive(self.sock)
        except BlockingIOError:
            raise
        except OSError:
            return None
        except Exception:  # user code wrote to a descriptor that isn't its own
            logger.exception("A worker sent what can't be read; it is ended.")
            return None

    def note(self, records: list[tuple[Any, ...]]) -> bool:
        """What records say of itself; whether it has started by them."""
        started = False
        for record in records:
            match record:
                case ("hello", pid, resident_mb):
                    self._reported(pid, resident_mb)
                    started = True
                case ("broken", detail):
                    self.fate = self.fate or Fate("died", f"its program raised\n{detail}")
                case ("unopened", detail):
                    self.fate = self.fate or Fate("start", detail)
        return started

    def _reported(self, pid: int, resident_mb: float) -> None:
        self.pid, self.born_mb, self.resident_mb = pid, resident_mb, resident_mb
        self.group = MemoryGroup.make(self.token)
        if self.group is not None:
            self.group.add(pid)
        self._resize(self.size)

    def serve(self, lease: Lease, surroundings: Surroundings, cores: tuple[int, ...]) -> bool:
        """Belong to a lease from now on, of its size, on these cores; ``False`` where something is still to be sent."""
        self.lease, lease.worker, self.before = lease, self, self.serial
        if cores and cores != self.cores:
            pin(self.pid, cores)
            self.cores = cores
        if surroundings == self.surroundings and lease.size == self.size:
            return True
        self._resize(lease.size)
        self.surroundings = surroundings
        return self.send(("adopt", surroundings, lease.size.vcpus))

    def _resize(self, size: Size) -> None:
        self.size = size
        self.limit_mb = max(float(size.memory_mb), self.born_mb + HEADROOM_MB)
        if self.group is not None:
            self.group.cap(self.limit_mb)

    @property
    def engaged(self) -> bool:
        """Whether ending its lease means ending it: it runs something, or hasn't started yet."""
        return self.bundle is not None or not self.pid

    def send(self, message: object) -> bool:
        """Write a message as far as the socket takes it; ``True`` when all of it went."""
        self.backlog.extend(encode(message))
        return self.flush()

    def flush(self) -> bool:
        """Write what is waiting as far as the socket takes it at once; ``True`` when nothing is left."""
        try:
            if self.backlog:
                self.backlog.send(self.sock)
        except BlockingIOError:
            return False
        except OSError:  # it has ended, which is noticed elsewhere
            self.backlog = Backlog()
        return not self.backlog

    def run(self, bundle: Bundle) -> bool:
        """Send a bundle, with its program where the worker doesn't have it."""
        key = f"{self.lease.owner if self.lease else ''}:{bundle.program_key}"
        items = tuple((item, lift(payload)) for item, payload in bundle.items)
        known = key in self._programs
        forget = () if known or len(self._programs) < _PROGRAMS else (next(iter(self._programs)),)
        program = None if known else bundle.program
        frame = encode(("run", self.serial + 1, key, program, forget, items, lift_all(bundle.parts)))
        self._programs[key] = None
        self._programs.move_to_end(key)
        for gone in forget:
            del self._programs[gone]
        self.serial, self.bundle, self.peak_mb = self.serial + 1, bundle, 0.0
        self.backlog.extend(frame)
        return self.flush()

    def reading(self) -> Reading:
        """How far its bundle is."""
        return self.page.read(self.serial)

    def reports(self, records: list[tuple[Any, ...]], lease: Lease) -> Iterator[Report]:
        """What a frame of records says about ``lease`` and the bundle it runs."""
        items: list[ItemReport] = []
        bundle = self.bundle.id if self.bundle else -1
        for record in records:
            match record:
                case ("item", item, started, ended, *outcome):
                    items.append(ItemReport(item, Outcome(*outcome), started, ended))
                    continue
            if items:
                yield Progress(lease.id, bundle, tuple(items))
                items = []
            match record:
                case ("chatter", serial, payload):
                    if serial > self.before:  # else it is an afterthought of an earlier lease
                        yield Chatter(lease.id, payload)
                case ("finished", _, left_mb, received, ended, open_s, cpu_s, peak_mb, bytes_in, bytes_out):
                    self.resident_mb, peak_mb = left_mb, max(peak_mb, self.peak_mb)
                    yield Finished(lease.id, bundle, received, ended, open_s, cpu_s, peak_mb, bytes_in, bytes_out)
        if items:
            yield Progress(lease.id, bundle, tuple(items))

    def loss(self, lease: Lease, status: int | None) -> Lost:
        """What is lost with it, as it ended with wait status ``status``."""
        ended = Fate("died", describe(status))
        if not self.pid:
            ended = Fate(
                "start", f"its process ended before it reported ({describe(status)}); its error output says why"
            )
        if self.group is not None and self.group.over:
            ended = Fate("memory", f"out of memory: ended by the kernel beyond {self.limit_mb:.0f} MB")
        fate = self.fate or ended
        peak_mb = max(self.peak_mb, self.resident_mb)
        in_time = Fate("died", "ended for the timeout of an item that finished at that very moment")
        if self.bundle is None:
            fate = fate if fate.index is None else in_time
            return Lost(lease.id, fate.reason, fate.detail, None, (), peak_mb, self.limit_mb)
        reading, items = self.reading(), self.bundle.items
        running = items[reading.started - 1][0] if reading.running else None
        if fate.index is not None and (running is None or fate.index != reading.started - 1):
            fate = in_time
        untouched = tuple(item for item, _ in items[reading.started :])
        return Lost(lease.id, fate.reason, fate.detail, running, untouched, peak_mb, self.limit_mb, self.bundle.id)

    def close(self) -> None:
        self.sock.close()
        self.page.close()
        if self.group is not None:
            self.group.close()


def describe(status: int | None) -> str:
    """A wait status in words."""
    if status is None:
        return "ended with the process that started it"
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return f"exit status {os.WEXITSTATUS(status)}"

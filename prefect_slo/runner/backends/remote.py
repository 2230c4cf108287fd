"""Bundles on machines of a cluster: the cluster's scheduler places them, and worker processes run them where they land.

Dask and Ray have workers of their own. What they are handed here is a call of ``run_here``, which runs one bundle on
worker processes of the machine it is on, the same as those of this machine: warm from one bundle to the next, held to
their memory and their time limits, ended with their parent. So a bundle does on a cluster what it does at home.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from math import inf
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from prefect_slo.resources import Size
from prefect_slo.runner.backends.processes import ProcessBackend
from prefect_slo.runner.backends.protocol import (
    Bundle,
    Finished,
    ItemReport,
    Lost,
    Opened,
    Progress,
    Report,
)
from prefect_slo.runner.local.gpus import limits, sharing
from prefect_slo.runner.local.ledger import Claim, Ledger, MemoryBook
from prefect_slo.runner.local.limits import machine_memory_mb
from prefect_slo.runner.preload import PRELOAD

KEPT_WARM = 8
"""Worker processes that wait for the next bundle in one worker of the cluster."""

IDLE_S = 60.0
"""How long they wait."""

GONE_S = 10.0
"""How long a reply waits for the process that held a share of a device; what doesn't leave is killed before that."""


@dataclass(frozen=True)
class Work:
    """A bundle on its way.

    Attributes:
        token: Names it among all bundles of all runs.
        bundle: The bundle.
        size: What its worker gets.
        env: Environment of its worker: Prefect's settings and the address of the API.
        capped: Whether its worker is held to the memory of its size; else to that of the machine.
    """

    token: str
    bundle: Bundle
    size: Size
    env: tuple[tuple[str, str], ...]
    capped: bool = True


@dataclass(frozen=True)
class Reply:
    """What came of a bundle.

    Attributes:
        reports: Reports of it, ``Opened`` first, ``Finished`` or ``Lost`` last; instants are of that machine's clock.
        machine: Names the machine, and its start.
        begun: When the bundle got its turn, by that clock.
        sent: When the reply was sent, by that clock.
        worker: Names the worker of the cluster that ran it.
    """

    reports: tuple[Report, ...]
    machine: str
    begun: float
    sent: float
    worker: str = ""


@dataclass(frozen=True)
class Left:
    """Stands in a reply for a part of an outcome that stays on the cluster.

    Attributes:
        handle: Its number; for whoever receives the reply, what the cluster's client knows it by.
        size: Its bytes.
    """

    handle: Any
    size: int


def run_here(work: Work, parts: Sequence[bytes] = (), refused: Callable[[], str] = str) -> Reply | str:
    """Run a bundle on worker processes of this machine, to its end.

    Args:
        work: The bundle.
        parts: What its payloads refer to.
        refused: Asked first, when the bundle can be cancelled already: in words, why it is not to be run.
    """
    begun, work = time.monotonic(), replace(work, bundle=replace(work.bundle, parts=tuple(parts)))
    news: News = SimpleQueue()
    with _LOCK:
        _RUNNING[work.token] = news
    try:
        if why := refused():
            return why
        share = work.size.share  # which device it is, the cluster's scheduler has said in the environment
        held = tuple(sorted(limits(share, sharing()).items())) if share is not None else ()
        # a process keeps what it has taken on a device as long as it lives: one with a share serves one bundle
        backend = _backend((*work.env, *held), KEPT_WARM if share is None else 0)
        reports = _run(backend, work, news)
        if share is not None:  # the cluster's scheduler gives the share away with the reply
            _until_gone(backend, reports)
        return Reply(reports, machine(), begun, time.monotonic())
    finally:
        with _LOCK:
            del _RUNNING[work.token]


def leave(reply: Reply, keep: int | None, most: float = inf) -> tuple[Reply, list[bytes]]:
    """A reply without its large parts, and those parts.

    Args:
        reply: The reply.
        keep: How large is large, in bytes; ``None`` for nothing.
        most: How many may stay at most.
    """
    left: list[bytes] = []

    def one(part: bytes) -> bytes | Left:
        if keep is None or len(part) < keep or len(left) >= most:
            return part
        left.append(part)
        return Left(len(left) - 1, len(part))

    return replace(reply, reports=tuple(each_part(report, one) for report in reply.reports)), left


def placed(reply: Reply, handle: Callable[[int], Any]) -> Reply:
    """A reply in which the parts that were left are known by the client's handles.

    Args:
        reply: The reply.
        handle: The handle of a part, by number.
    """

    def one(part: bytes | Left) -> bytes | Left:
        return part if isinstance(part, bytes) else replace(part, handle=handle(part.handle))

    return replace(reply, reports=tuple(each_part(report, one) for report in reply.reports))


def each_part(report: Report, one: Callable[[Any], Any]) -> Report:
    """A report with something else for each part of its outcomes."""
    if not isinstance(report, Progress) or not any(item.outcome.parts for item in report.items):
        return report
    outcomes = (replace(item.outcome, parts=tuple(map(one, item.outcome.parts))) for item in report.items)
    items = zip(report.items, outcomes, strict=True)
    return replace(report, items=tuple(replace(item, outcome=outcome) for item, outcome in items))


def cancel_here(token: str) -> bool:
    """End a bundle, if it runs in this process; whether it does."""
    with _LOCK:
        news = _RUNNING.get(token)
    if news is not None:
        news.put(None)
    return news is not None


def machine() -> str:
    """Names this machine and its start: what has this name shares one monotonic clock."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}/{boot}"


class Clocks:
    """Instants of other machines' clocks on this one's.

    A reply is on its way for some time, so that a clock is at most as far ahead as each reply makes it look: the least
    of what was seen is the best guess.
    """

    def __init__(self) -> None:
        self._ahead: dict[str, float] = {machine(): 0.0}

    def seen(self, reply: Reply, received: float) -> float:
        """What to add to the instants of a reply that was received then."""
        known = self._ahead.get(reply.machine)
        if known != 0.0:
            known = min(received - reply.sent, known) if known is not None else received - reply.sent
            self._ahead[reply.machine] = known
        return known


def told(reply: Reply, lease: int, ahead: float) -> Iterator[Report]:
    """Reports of a reply as this machine's runner takes them: of its lease, by its clock, the start part of the end."""
    start_s, held = 0.0, (reply.begun + ahead, reply.sent + ahead)
    for report in reply.reports:
        match report:
            case Opened():
                start_s = report.start_s
            case Progress(items=items):
                moved = tuple(ItemReport(i.item, i.outcome, i.started + ahead, i.ended + ahead) for i in items)
                yield Progress(lease, report.bundle, moved)
            case Finished():
                received, ended = report.received + ahead, report.ended + ahead
                yield replace(report, lease=lease, received=received, ended=ended, init_s=start_s, held=held)
            case Lost():
                yield replace(report, lease=lease, held=held)
            case _:
                yield replace(report, lease=lease)


def needed(size: Size, resources: Mapping[str, str]) -> dict[str, float]:
    """What a size takes of named resources.

    Args:
        size: The size.
        resources: Names by quantity: ``vcpus``, ``memory_mb``, ``gpu``.
    """
    wanted = {"vcpus": size.vcpus, "memory_mb": float(size.memory_mb), "gpu": size.gpu}
    return {resources[name]: value for name, value in wanted.items() if value and name in resources}


class Unaccounted(Ledger):
    """A ledger that grants everything: the cluster's scheduler does the accounting."""

    def __init__(self) -> None:
        super().__init__(MemoryBook())

    def claim(self, vcpus: float) -> Claim:
        """Granted, without cores of its own."""
        return Claim.unaccounted(vcpus)

    def retry(self, claim: Claim) -> bool:
        """Granted already."""
        return True

    def release(self, claim: Claim) -> None:
        """Nothing was taken."""


News = SimpleQueue[Report | None]
"""Reports of a bundle that runs here; ``None`` where it is to be ended."""

_LOCK = threading.Lock()
_RUNNING: dict[str, News] = {}
_BACKENDS: dict[tuple[tuple[tuple[str, str], ...], int], ProcessBackend] = {}
_LEASES = count(1)


def _run(backend: ProcessBackend, work: Work, news: News) -> tuple[Report, ...]:
    lease, reports = next(_LEASES), list[Report]()
    memory_mb = work.size.memory_mb if work.capped else int(machine_memory_mb())
    backend.open(lease, Size(work.size.vcpus, memory_mb), news.put)
    while True:
        report = news.get()
        if report is None:
            backend.cancel(lease)
            continue
        reports.append(report)
        match report:
            case Opened():
                backend.submit(lease, work.bundle)
            case Finished() | Lost():
                backend.close(lease)
                return tuple(reports)


def _until_gone(backend: ProcessBackend, reports: Sequence[Report]) -> None:
    """Wait until the process that served a bundle has ended, and with it what it held of a device."""
    pids, until = {report.pid for report in reports if isinstance(report, Opened)}, time.monotonic() + GONE_S
    while pids & set(backend.pids) and time.monotonic() < until:
        time.sleep(0.005)


def _backend(env: tuple[tuple[str, str], ...], kept: int) -> ProcessBackend:
    with _LOCK:
        backend = _BACKENDS.get((env, kept))
        if backend is None or backend.stopped:
            backend = _BACKENDS[env, kept] = ProcessBackend(
                env=dict(env), preload=PRELOAD, ledger=Unaccounted(), max_idle=kept, idle_s=IDLE_S
            )
        return backend

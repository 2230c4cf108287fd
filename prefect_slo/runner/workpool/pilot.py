"""A pilot: a job in a work pool that runs the bundles which come by its mailbox, until it is not needed any more.

Bundles run in a worker process beside it, as they do on the flow's own machine: sized, watched and ended by force where
an item overruns or outgrows its memory, which the job survives. What a worker reports goes back in small messages, and
task runs are those of the flow that sent the work.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

import psutil
from prefect.logging import get_logger

from prefect_slo.resources import Size
from prefect_slo.runner.backends.local import named_gpus, usable_gpus, worker_environment
from prefect_slo.runner.backends.processes import ProcessBackend
from prefect_slo.runner.backends.protocol import Bundle, Finished, Lost, Opened, Progress, Report
from prefect_slo.runner.local.gpus import SHARE
from prefect_slo.runner.local.launch import Forker
from prefect_slo.runner.preload import PRELOAD
from prefect_slo.runner.workpool.mailbox import BEAT, FROM_JOB, TO_JOB, Heart, Incoming, Outgoing, Pulse, pause_s
from prefect_slo.runner.workpool.stores import Store, referred

VERSION = version("prefect-slo")
GATHER_S = 0.01
"""Reports of one bundle travel together over this long, or over one look at slower storage."""

START_ATTEMPTS = 3
SETTLE_S, LONGEST_PAUSE_S = 10.0, 2.0


@dataclass(frozen=True)
class Order:
    """What a pilot is told with its flow run: plain JSON, no secrets.

    Attributes:
        storage: Where its mailbox is.
        box: Its mailbox.
        office: Box in which the flow's process gives signs of life.
        size: Its worker.
        idle_s: It ends when nothing has come for this long.
        lifetime_s: It takes nothing new after this long.
        heartbeat_s: It gives a sign of life this often.
        silent_s: It ends when the flow's process has given no sign of life for this long.
        places_gpus: Whether jobs on a machine have its GPUs in common, so that its worker has to be given a share of
            them; else the job was given its own.
        version: Of prefect_slo, there.
        python: Major and minor version of Python, there.
    """

    storage: dict[str, Any]
    box: str
    office: str
    size: dict[str, Any]
    idle_s: float
    lifetime_s: float
    heartbeat_s: float
    silent_s: float
    places_gpus: bool = False
    version: str = VERSION
    python: list[int] = field(default_factory=lambda: list(sys.version_info[:2]))

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Letter:
    """What a pilot sends.

    Attributes:
        sent: When, on its own clock.
        received: By bundle, when its message was received, on that clock.
        reports: Reports of its worker, in order.
        over: Why it ends, in words, in its last letter.
        age_s: How long its job's process has lived.
    """

    sent: float
    received: dict[int, float]
    reports: tuple[Report, ...]
    over: str = ""
    age_s: float = 0.0


class Pilot:
    """One pilot, in its job.

    Args:
        order: What it was told.
        zygote: Forks its workers, where there is one already.
    """

    def __init__(self, order: Order, zygote: Forker | None = None) -> None:
        self._order, self._store, self._zygote = order, referred(order.storage), zygote
        self._size, self._told = _here(Size(**order.size), places_gpus=order.places_gpus)
        self._no_gpu = order.places_gpus and order.size["gpu"] > 0 and not self._size.gpu
        self._inbox = Incoming(self._store, order.box, TO_JOB)
        self._programs: dict[str, Any] = {}
        self._events: SimpleQueue[Report] = SimpleQueue()
        self._sender = Sender(self._store, order.box)
        self._lease, self._failures = 0, 0
        self._bundle: int | None = None
        self._up = False  # its worker; it may wait long for its share of the machine
        self._idle_since = time.monotonic()

    def serve(self) -> str:
        """Run bundles until there is a reason not to; returns the reason."""
        mismatch = self._mismatch()
        if mismatch:
            self._sender.end(mismatch)
            return mismatch
        backend = ProcessBackend(
            env={**worker_environment(None), **self._told}, preload=PRELOAD, gpu_devices=named_gpus(),
            zygote=self._zygote,
        )  # fmt: skip
        ended = "its job was ended"
        heart = Heart(
            self._store, self._order.box, self._order.heartbeat_s,
            missed=lambda error: None,  # the main thread says what is wrong with the mailbox
        )  # fmt: skip
        self._sender.begin()
        try:
            self._open(backend)
            ended = self._loop(backend)
        finally:
            heart.stop()
            backend.shutdown()
            self._sender.end(ended)
        if ended in (CLOSED, ALONE):
            self._store.clear(self._order.box)
        if ended == ALONE:
            self._store.clear(self._order.office)
        return ended

    def _loop(self, backend: ProcessBackend) -> str:
        begun = heard = looked = time.monotonic()
        pulse = Pulse(begun)
        while True:
            now = time.monotonic()
            self._forward(backend, pause_s(self._store, now - heard))
            if self._failures >= START_ATTEMPTS:
                return "its worker does not start"
            if self._sender.stuck_s(now) > self._order.silent_s:
                return f"its mailbox cannot be written ({self._sender.trouble})"
            try:
                message = self._inbox.receive()
                if now - looked >= self._order.silent_s / 10:
                    looked = now
                    if pulse.silent_s(self._store.read(self._order.office, BEAT), now) > self._order.silent_s:
                        return ALONE
            except Exception as error:  # storage that can't be reached now may be in a moment
                get_logger("slo").warning("The mailbox cannot be read: %r", error)
                if now - heard > self._order.silent_s and pulse.silent_s(None, now) > self._order.silent_s:
                    return "its mailbox cannot be reached"
                time.sleep(1.0)
                continue
            if message is None:
                if self._up and self._bundle is None and now - self._idle_since > self._order.idle_s:
                    return f"nothing came for {self._order.idle_s:g} s"
                if self._bundle is None and now - begun > self._order.lifetime_s:
                    return f"it has run for {self._order.lifetime_s:g} s"
                continue
            heard = self._idle_since = time.monotonic()
            match message:
                case ("run", int(lease), Bundle() as bundle):
                    self._run(backend, lease, bundle, heard)
                case ("cancel", int(lease)) if lease == self._lease:
                    backend.cancel(lease)
                case ("close",):
                    return CLOSED

    def _run(self, backend: ProcessBackend, lease: int, bundle: Bundle, received: float) -> None:
        program = self._programs.setdefault(bundle.program_key, bundle.program)
        if lease != self._lease:  # for a worker that was lost meanwhile: its sender has heard of that by now
            return
        self._bundle = bundle.id
        self._sender.received(bundle.id, received)
        backend.submit(self._lease, replace(bundle, program=program))

    def _forward(self, backend: ProcessBackend, wait_s: float) -> None:
        """Pass on what the worker reports, for so long at most where it reports nothing."""
        try:
            report = self._events.get(timeout=wait_s)
        except Empty:
            return
        while True:
            self._sender.post(replace(report, no_gpu=self._no_gpu) if isinstance(report, Opened) else report)
            self._idle_since = time.monotonic()
            if isinstance(report, Opened):
                self._up, self._failures = True, 0
            elif isinstance(report, Finished):
                self._bundle = None
            elif isinstance(report, Lost):
                self._failures += report.reason == "start" and report.bundle is None
                self._bundle = None
                if self._failures < START_ATTEMPTS:
                    self._open(backend)
            try:
                report = self._events.get_nowait()
            except Empty:
                return

    def _open(self, backend: ProcessBackend) -> None:
        self._up, self._lease = False, self._lease + 1
        vcpus = min(self._size.vcpus, backend.capabilities().vcpus)
        backend.open(self._lease, replace(self._size, vcpus=vcpus), self._events.put)

    def _mismatch(self) -> str:
        here, there = list(sys.version_info[:2]), self._order.python
        if here != there:
            versions = (".".join(map(str, version)) for version in (there, here))
            return "the flow runs on Python {} and its job on {}: they must be the same".format(*versions)
        if self._order.version != VERSION:
            return f"the flow has prefect-slo {self._order.version} and its job {VERSION}: they must be the same"
        return ""


def _here(size: Size, *, places_gpus: bool) -> tuple[Size, dict[str, str]]:
    """What its worker is as a process of this machine, whatever hardware the pool has, and what it is told of GPUs.

    Jobs that have the machine's GPUs in common have one account of them, with everything else of their user there. A
    container has GPUs of its own: its worker sees those, and is told how much they are.
    """
    plain = size.without_gpu if size.gpu else replace(size, hardware="cpu")
    if size.share is None:
        return plain, {}
    if not places_gpus:
        return plain, {SHARE: f"{size.gpu:g}"}
    if usable_gpus():
        return size, {}
    get_logger("slo").warning("This job was to have %s, and there is no GPU here: it runs on the CPU.", size.share)
    return plain, {}


CLOSED, ALONE = "it is not needed any more", "its flow gives no sign of life"


class Sender:
    """Sends what is posted in letters, from a thread of its own: at once when it was quiet, else gathered a little."""

    def __init__(self, store: Store, box: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._store, self._box, self._sleep = store, box, sleep
        self._out = Outgoing(store, box, FROM_JOB)
        self._posted: SimpleQueue[Report | str] = SimpleQueue()
        self._received: dict[int, float] = {}
        self._stuck_since: float | None = None
        self.trouble = ""
        self._give_up = math.inf
        self._thread = threading.Thread(target=self._run, name="prefect-slo-pilot-sender", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Send an empty letter: its job is up, whenever its worker will be."""
        self._posted.put("")

    def received(self, bundle: int, at: float) -> None:
        """A bundle was received at that instant."""
        self._received[bundle] = at

    def post(self, report: Report) -> None:
        """Send a report."""
        self._posted.put(report)

    def end(self, why: str) -> None:
        """Send what is left and why there will be no more; waits for that, within reason."""
        self._give_up = time.monotonic() + SETTLE_S
        self._posted.put(why)
        self._thread.join(SETTLE_S + 2 * LONGEST_PAUSE_S)  # what is too large to be written is given up, and that said

    def stuck_s(self, now: float) -> float:
        """For how long nothing could be written."""
        since = self._stuck_since
        return now - since if since is not None else 0.0

    def _run(self) -> None:
        wait_s = max(GATHER_S, self._store.poll_s)
        while True:
            first = self._posted.get()
            posted = [first]
            if isinstance(first, Progress):
                time.sleep(wait_s)
            while not self._posted.empty():
                posted.append(self._posted.get())
            over = next((one for one in posted if isinstance(one, str) and one), "")
            reports = tuple(one for one in posted if not isinstance(one, str))
            received, self._received = self._received, {}
            self._deliver(Letter(time.monotonic(), received, reports, over, _age_s()))
            if over:
                return

    def _deliver(self, letter: Letter) -> None:
        """Try until it is written or the job is over: a letter that is left out would be waited for, for ever."""
        for attempt in count():
            try:
                self._out.send(letter)
                self._stuck_since = None
                return
            except Exception as error:
                now = time.monotonic()
                self._stuck_since, self.trouble = self._stuck_since or now, repr(error)
                if now > self._give_up:
                    get_logger("slo").error("%s reports could not be delivered: %r", len(letter.reports), error)
                    if letter.over and letter.reports:  # why is short, and may fit where they don't
                        with suppress(Exception):
                            self._out.send(replace(letter, reports=()))
                    return
                if attempt == 0:
                    get_logger("slo").warning("The mailbox cannot be written, and is tried again: %r", error)
                self._sleep(min(0.1 * 2**attempt, LONGEST_PAUSE_S))


def _age_s() -> float:
    """How long this process has lived: what its machine has been paid for, at least."""
    return max(time.time() - float(psutil.Process().create_time()), 0.0)

"""The office: the pilots of one work pool for the flows of this process, each with a postman of its own.

A pilot that is given back stays warm for as long as starting another one takes (within a factor of two of the best that
could be done by one who knew the future), and serves the next lease of its size. Postmen read the mailboxes. A watch
asks the API for jobs and, gently, for what became of them: nothing depends on events being delivered, or on the API's
being there all the time. A heart gives the jobs the sign of life without which they end by themselves.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import asdict, dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any
from uuid import UUID

from prefect.exceptions import ObjectNotFound
from prefect.logging import get_logger

from prefect_slo.control.events import LossReason
from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Bundle, Chatter, Finished, ItemReport, Lost, Opened, Progress, Sink
from prefect_slo.runner.workpool.jobs import Jobs
from prefect_slo.runner.workpool.mailbox import FROM_JOB, TO_JOB, Incoming, Offset, Outgoing, Pulse
from prefect_slo.runner.workpool.pilot import Letter, Order
from prefect_slo.runner.workpool.stores import Store

WAIT_AND_SEE = (408, 429)
"""Refusals of the API that say nothing of what was asked for."""

LOOK_S = 2.0
"""Between two looks at the states of jobs."""

CANCEL_S = 5.0
"""A worker that is to end what it runs says so within this; after that its lease is given up unheard."""

DRAIN_S = 1.0
"""What a job has sent before it ended may take this long to be seen."""

SILENT = 6
"""Heartbeats without a change after which the other side is taken for gone."""

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Terms:
    """How an office keeps its pilots.

    Attributes:
        concurrency: Pilots at once.
        idle_s: How long they stay warm; ``None``: as long as starting one has taken.
        lifetime_s: A pilot takes nothing new after this long.
        patience_s: How long a job may take to start before the user hears of it.
        give_up_s: How long before those that wait for it are told that it does not start.
        heartbeat_s: Between two signs of life.
    """

    concurrency: int = 16
    idle_s: float | None = None
    lifetime_s: float = 3600.0
    patience_s: float = 60.0
    give_up_s: float = 900.0
    heartbeat_s: float = 5.0


@dataclass
class Lease:
    """What a backend asked for.

    Attributes:
        id: Its name for the one who asked.
        size: Of the worker.
        sink: Hears of it.
        notice: Tells the user something.
        asked: When.
    """

    id: int
    size: Size
    sink: Sink
    notice: Notice
    asked: float


class Office:
    """Pilots of one pool.

    Args:
        name: The pool's name.
        jobs: The pool's jobs, for the watch alone.
        store: Where mailboxes are.
        variables: Job variables of a size.
        terms: How pilots are kept.
        context: In which the API is spoken to.
    """

    def __init__(
        self,
        name: str,
        jobs: Jobs,
        store: Store,
        variables: Callable[[Size], Mapping[str, Any]],
        terms: Terms,
        context: Context,
    ) -> None:
        self.name, self.store, self.terms = name, store, terms
        self._jobs, self._variables = jobs, variables
        self.box = f"office-{uuid.uuid4().hex}"
        self._lock = threading.RLock()
        self._pilots: list[Pilot] = []
        self._waiting: list[Lease] = []
        self._starts_s: list[float] = []
        self._errands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._over = threading.Event()
        self._noticed = False
        self._heart = threading.Thread(target=self._beat, name="prefect-slo-heart", daemon=True)
        self._watch = threading.Thread(
            target=context.run, args=(self._look_after,), name="prefect-slo-watch", daemon=True
        )
        self._heart.start()
        self._watch.start()

    # ---- leases -----------------------------------------------------------------------------------------------------

    def open(self, lease: Lease) -> None:
        """Ask for a pilot of a size: a warm one, or one that has still to start."""
        with self._lock:
            self._waiting.append(lease)
            self._admit()

    def submit(self, lease: Lease, bundle: Bundle) -> None:
        """Hand a bundle to the pilot of a lease."""
        if (pilot := self._pilot_of(lease)) is not None:
            pilot.submit(bundle)

    def cancel(self, lease: Lease, detail: str = "cancelled") -> None:
        """End what a lease runs, and the lease."""
        with self._lock:
            pilot = self._pilot_of(lease)
            if pilot is not None and pilot.bundle is not None:
                pilot.cancel()
                return
            if lease in self._waiting:
                self._waiting.remove(lease)
            elif pilot is None:
                return
        lease.sink(Lost(lease.id, "cancelled", detail))
        if pilot is not None:
            self.release(pilot)

    def close(self, lease: Lease) -> None:
        """Give a lease back."""
        with self._lock:
            if lease in self._waiting:
                self._waiting.remove(lease)
            elif (pilot := self._pilot_of(lease)) is not None:
                self.release(pilot)

    def holds(self, lease: Lease) -> bool:
        """Whether a lease is neither closed nor lost."""
        with self._lock:
            return lease in self._waiting or self._pilot_of(lease) is not None

    # ---- pilots -----------------------------------------------------------------------------------------------------

    @property
    def keep_s(self) -> float:
        """How long a pilot stays warm."""
        if self.terms.idle_s is not None:
            return self.terms.idle_s
        with self._lock:
            return statistics.median(self._starts_s) if self._starts_s else 10.0

    @property
    def pilots(self) -> tuple[Pilot, ...]:
        """Those that start, run or idle now."""
        with self._lock:
            return tuple(self._pilots)

    def release(self, pilot: Pilot) -> None:
        """A pilot is free; one of a size that nobody waits for idles, or makes room for one that is waited for."""
        with self._lock:
            pilot.lease, pilot.idle_since = None, time.monotonic()
            self._admit()
        pilot.wake()

    def started(self, took_s: float) -> None:
        """A pilot took so long to start."""
        with self._lock:
            self._starts_s = [*self._starts_s[-31:], took_s]

    def left(self, pilot: Pilot) -> None:
        """A pilot is gone or on its way."""
        with self._lock:
            if pilot in self._pilots:
                self._pilots.remove(pilot)
            self._admit()

    def _admit(self) -> None:
        """Serve who waits, first come first."""
        while self._waiting and not self._over.is_set():
            lease = self._waiting[0]
            free = [pilot for pilot in self._pilots if pilot.lease is None and pilot.usable(lease.size)]
            if free:
                self._waiting.pop(0)
                max(free, key=lambda pilot: (pilot.ready, pilot.idle_since)).serve(lease)
                continue
            if len(self._pilots) >= self.terms.concurrency:
                idle = [pilot for pilot in self._pilots if pilot.lease is None]
                if not idle:
                    return
                idle[0].leave()  # comes back here once it is out
                return
            self._waiting.pop(0)
            pilot = Pilot(self, lease.size)
            self._pilots.append(pilot)
            pilot.serve(lease)
            self._errands.put(lambda pilot=pilot: self._start(pilot))  # type: ignore[misc]

    def _pilot_of(self, lease: Lease) -> Pilot | None:
        with self._lock:
            return next((pilot for pilot in self._pilots if pilot.lease is lease), None)

    # ---- the watch --------------------------------------------------------------------------------------------------

    def _look_after(self) -> None:
        looked = 0.0
        while True:
            try:
                errand = self._errands.get(timeout=max(looked + LOOK_S - time.monotonic(), 0.01))
            except Empty:
                looked = time.monotonic()
                if not self._over.is_set():
                    self._carefully(self._look)
                continue
            if errand is None:
                self._carefully(self._jobs.close)
                return
            self._carefully(errand)

    def _carefully(self, errand: Callable[[], None]) -> None:
        try:
            errand()
        except Exception as error:  # the API may be back in a moment; jobs and mailboxes do without it
            get_logger("slo").debug("Prefect's API could not be asked about pool %r: %r", self.name, error)

    def _start(self, pilot: Pilot) -> None:
        """Ask for a pilot's job; again later where the API is not there."""
        if pilot.gone.is_set():
            return
        try:
            try:
                pilot.flow_run = self._ask_for(pilot)
            except ObjectNotFound:  # somebody has deleted the deployment
                self._jobs.prepare()
                pilot.flow_run = self._ask_for(pilot)
        except Exception as error:
            code = getattr(getattr(error, "response", None), "status_code", 0)
            if (400 <= code < 500 and code not in WAIT_AND_SEE) or isinstance(error, ObjectNotFound):
                pilot.lose("start", f"its job in work pool {self.name!r} was refused: {error}")
                return
            if time.monotonic() - pilot.born > self.terms.give_up_s:
                pilot.lose("start", f"no job could be asked for in work pool {self.name!r}: {error!r}")
                return
            retry = threading.Timer(LOOK_S, self._errands.put, [lambda: self._start(pilot)])
            retry.daemon = True
            retry.start()

    def _ask_for(self, pilot: Pilot) -> UUID:
        name = f"pilot-{self.name}-{pilot.box[-6:]}"
        return self._jobs.start(name, pilot.order(), self._variables(pilot.size))

    def _look(self) -> None:
        pilots = {pilot.flow_run: pilot for pilot in self.pilots if pilot.flow_run is not None}
        if not pilots:
            return
        states = self._jobs.states([flow_run for flow_run in pilots if flow_run is not None])
        for flow_run, pilot in pilots.items():
            state = states.get(flow_run) if flow_run is not None else None
            if flow_run not in states:
                pilot.job_ended("its flow run was deleted")
            elif state is not None and state.is_final():
                words = f": {state.message}" if state.message else ""
                pilot.job_ended(f"its job has ended as {state.name}{words}")
        self._complain([pilot for pilot in pilots.values() if not pilot.heard_of and pilot.lease is not None])

    def _complain(self, starting: list[Pilot]) -> None:
        now = time.monotonic()
        late = [pilot for pilot in starting if now - pilot.born > self.terms.patience_s]
        if not late:
            self._noticed = self._noticed and bool(starting)
            return
        trouble = self._jobs.trouble() or "has not started a job yet: look at its worker's log"
        if not self._noticed:
            self._noticed = True
            lease = late[0].lease
            if lease is not None:
                lease.notice(
                    f"{len(late)} jobs have waited {now - late[0].born:.0f} s: work pool {self.name!r} {trouble}."
                )
        for pilot in late:
            if now - pilot.born > self.terms.give_up_s:
                pilot.lose("start", f"work pool {self.name!r} {trouble}")

    def call_off(self, pilot: Pilot) -> None:
        """Want a pilot's job no more, which may just be asked for; its box goes where it never started."""
        self._errands.put(lambda: self._call_off(pilot))

    def _call_off(self, pilot: Pilot) -> None:
        if pilot.flow_run is None or self._jobs.cancel(pilot.flow_run):
            self.store.clear(pilot.box)

    def write_off(self, pilot: Pilot, why: str) -> None:
        """A pilot's job is gone without having said so: no flow run is left running."""
        if (flow_run := pilot.flow_run) is not None:
            self._errands.put(lambda: self._jobs.crashed(flow_run, why))

    def clear(self, pilot: Pilot) -> None:
        """Delete the mailbox of a pilot that is gone."""
        self._carefully(lambda: self.store.clear(pilot.box))

    # ---- the heart --------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            try:
                self.store.write(self.box, "beat", f"{count}".encode())
            except Exception as error:
                get_logger("slo").warning("Storage of work pool %r cannot be written: %r", self.name, error)
            self._over.wait(self.terms.heartbeat_s)

    def shut(self, patience_s: float = 10.0) -> None:
        """Send every pilot home. Idempotent."""
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
            pilots, self._waiting = list(self._pilots), []
        for pilot in pilots:
            pilot.leave()
        deadline = time.monotonic() + patience_s
        for pilot in pilots:
            pilot.gone.wait(max(deadline - time.monotonic(), 0))
        self._errands.put(None)
        self._watch.join(max(deadline - time.monotonic(), 0.1))
        self._heart.join(1)
        self._carefully(lambda: self.store.clear(self.box))


class Pilot:
    """A pilot as its office knows it; its mailbox is this thread's alone.

    Attributes:
        size: Of its worker.
        box: Its mailbox.
        born: When it was asked for.
        flow_run: Its job, once that has been asked for.
        lease: Who it serves.
        bundle: What it runs.
        ready: Whether its worker is up.
        idle_since: Since when nobody needs it.
        gone: Set once nothing more is heard of it.
    """

    def __init__(self, office: Office, size: Size) -> None:
        self._office, self.size = office, size
        self.box = f"{office.box}/{uuid.uuid4().hex}"
        self.born = self.idle_since = time.monotonic()
        self.flow_run: UUID | None = None
        self.lease: Lease | None = None
        self.bundle: Bundle | None = None
        self.ready, self.gone = False, threading.Event()
        self._pid = self._generation = 0
        self.heard_of = False
        self._leaving = False
        self._job_ended: tuple[str, float] | None = None
        self._cancelled: float | None = None
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._unsent: Any = None  # taken from it, and not written yet
        self._out = Outgoing(office.store, self.box, TO_JOB)
        self._in = Incoming(office.store, self.box, FROM_JOB)
        self._programs: set[str] = set()
        self._sent: dict[int, float] = {}
        self._offset = Offset()
        self._thread = threading.Thread(target=self._run, name="prefect-slo-postman", daemon=True)
        self._thread.start()

    def order(self) -> Order:
        """What its job is told."""
        terms = self._office.terms
        return Order(
            storage=self._office.store.reference,
            box=self.box,
            office=self._office.box,
            size=asdict(self.size),
            idle_s=max(4 * self._office.keep_s, 60.0),  # its office sends it home before
            lifetime_s=2 * terms.lifetime_s,
            heartbeat_s=terms.heartbeat_s,
            silent_s=SILENT * terms.heartbeat_s,
        )

    def usable(self, size: Size) -> bool:
        """Whether it may serve a lease of that size."""
        young = time.monotonic() - self.born < self._office.terms.lifetime_s
        return self.size == size and young and not self._leaving and not self.gone.is_set() and self._job_ended is None

    def serve(self, lease: Lease) -> None:
        """Belong to a lease from now on."""
        self.lease, self._cancelled = lease, None
        if self.ready:
            wait_s = time.monotonic() - lease.asked
            lease.sink(Opened(lease.id, cold=False, start_s=0.0, wait_s=wait_s, pid=self._pid))

    def submit(self, bundle: Bundle) -> None:
        """Send a bundle on its way."""
        self.bundle, self._cancelled = bundle, None
        self._outbox.put((self._generation, bundle))

    def cancel(self) -> None:
        """End what it runs; its lease is lost once the worker says so, or doesn't."""
        self._cancelled = time.monotonic()
        self._outbox.put(("cancel", self._generation))

    def leave(self) -> None:
        """Go home, from now on of no use to anybody."""
        self._leaving = True
        self.wake()

    def wake(self) -> None:
        """Look at once."""
        self._outbox.put(None)

    def job_ended(self, why: str) -> None:
        """Its job is over: what it had sent is still read, then it is lost."""
        if self._job_ended is None:
            self._job_ended = (why, time.monotonic())
            self.wake()

    def lose(self, reason: LossReason, detail: str) -> None:
        """It is gone, and with it what it had not reported."""
        office = self._office
        if self.gone.is_set():
            return
        self.gone.set()
        lease, bundle = self.lease, self.bundle
        office.left(self)
        self.lease = self.bundle = None
        if lease is not None:
            lost = Lost(lease.id, reason, detail, bundle=bundle.id if bundle is not None else None)
            lease.sink(replace(lost, reason="cancelled", detail="cancelled") if self._cancelled is not None else lost)
        office.clear(self)
        if not self.heard_of:
            office.call_off(self)

    # ---- the postman ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        store, quiet_since = self._office.store, time.monotonic()
        pulse = Pulse(quiet_since)
        felt = quiet_since
        while not self.gone.is_set():
            quiet_s = time.monotonic() - quiet_since
            pause_s = max(store.poll_s, min(quiet_s / 50, 10 * store.poll_s))
            try:
                if self._send(pause_s):
                    quiet_since = time.monotonic()
                while (letter := self._in.receive()) is not None:
                    quiet_since = time.monotonic()
                    self._read(letter, quiet_since)
                    if letter.over:
                        self.lose("died" if self._pid else "start", letter.over)
                if time.monotonic() - felt > self._office.terms.heartbeat_s:
                    felt = time.monotonic()
                    self._feel(pulse, felt)
            except Exception as error:
                get_logger("slo").warning("A mailbox of work pool %r cannot be reached: %r", self._office.name, error)
                time.sleep(1.0)
            self._mind(time.monotonic())

    def _send(self, wait_s: float) -> bool:
        if self._unsent is None:
            try:
                self._unsent = self._outbox.get(timeout=wait_s)
            except Empty:
                return False
        message = self._unsent  # sent again, under the same number, where writing it fails
        if isinstance(message, tuple) and isinstance(bundle := message[-1], Bundle):
            known = bundle.program_key in self._programs
            self._sent[bundle.id] = time.monotonic()
            self._out.send(("run", message[0], replace(bundle, program=None) if known else bundle))
            self._programs.add(bundle.program_key)
        elif message is not None:
            self._out.send(message)
        self._unsent = None
        return message is not None

    def _feel(self, pulse: Pulse, now: float) -> None:
        """Whether its job lives: one whose machine is gone may be Running for ever."""
        terms = self._office.terms
        silent_s = pulse.silent_s(self._office.store.read(self.box, "beat"), now)
        if self.heard_of and silent_s > SILENT * terms.heartbeat_s:
            why = f"its job has given no sign of life for {silent_s:.0f} s"
            self._office.write_off(self, why)
            self.lose("died", why)

    def _mind(self, now: float) -> None:
        """What time brings."""
        office = self._office
        if self._job_ended is not None and now - self._job_ended[1] > DRAIN_S + office.store.poll_s:
            self.lose("died" if self.heard_of else "start", self._job_ended[0])
        elif self._cancelled is not None and self.bundle is not None and now - self._cancelled > CANCEL_S:
            self.lose("cancelled", "cancelled")
            office.call_off(self)
        elif self.lease is None and (self._leaving or (self.ready and now - self.idle_since >= office.keep_s)):
            self._go_home()
        elif self._leaving:  # in the middle of something
            self._cancelled = now
            self._go_home()

    def _go_home(self) -> None:
        office = self._office
        with office._lock:
            if self.lease is not None and not self._leaving:
                return
            self._leaving = True
            lease, bundle = self.lease, self.bundle
            self.lease = self.bundle = None
        if lease is not None:
            lease.sink(Lost(lease.id, "cancelled", "cancelled", bundle=bundle.id if bundle is not None else None))
        with contextlib.suppress(Exception):
            self._out.send(("close",))
        self.gone.set()
        if not self.heard_of:
            office.call_off(self)
        office.left(self)

    # ---- letters ----------------------------------------------------------------------------------------------------

    def _read(self, letter: Letter, now: float) -> None:
        self.heard_of = True
        self._offset.received(now, letter.sent)
        for bundle, received in letter.received.items():
            if (sent := self._sent.pop(bundle, None)) is not None:
                self._offset.sent(sent, received)
        for report in letter.reports:
            self._pass_on(report, now)

    def _pass_on(self, report: Any, now: float) -> None:
        offset_s = self._offset.seconds
        match report:
            case Opened():
                self._up(report, now)
            case Progress(bundle=bundle, items=items) if self._runs(bundle):
                self._tell(Progress(0, bundle, tuple(_moved(item, offset_s, now) for item in items)))
            case Finished(bundle=bundle) if self._runs(bundle):
                self.bundle = None
                ended = min(report.ended + offset_s, now)
                self._tell(replace(report, received=min(report.received + offset_s, ended), ended=ended))
                if now - self.born > self._office.terms.lifetime_s:
                    self._retire()
            case Chatter():
                self._tell(report)
            case Lost():
                self._worker_lost(report)

    def _up(self, report: Opened, now: float) -> None:
        office, pid = self._office, report.pid
        with office._lock:
            self._pid, self._generation, first = pid, report.lease, self._pid == 0
            self.ready, self.idle_since = True, now
            lease = self.lease
        if first:
            office.started(now - self.born)
        if lease is not None:
            begun = max(lease.asked, self.born) if first else lease.asked
            lease.sink(Opened(lease.id, True, max(now - begun, 0.0), max(begun - lease.asked, 0.0), pid))

    def _worker_lost(self, report: Lost) -> None:
        office = self._office
        with office._lock:
            cancelled, self._cancelled = self._cancelled is not None, None
            self.ready, self.bundle = False, None
            if self.lease is None:
                return
            if report.reason == "cancelled" and not cancelled:  # that was for the lease before this one
                report = replace(report, reason="start", bundle=None)
            self._tell(report)
            office.release(self)

    def _retire(self) -> None:
        """Take nothing new: whoever holds it has to ask for another."""
        with self._office._lock:
            self._leaving = True
            self._tell(Lost(0, "died", "its pilot has lived long enough"))
            self.lease = None

    def _runs(self, bundle: int) -> bool:
        return self.bundle is not None and self.bundle.id == bundle

    def _tell(self, report: Any) -> None:
        if (lease := self.lease) is not None:
            lease.sink(replace(report, lease=lease.id))


def _moved(item: ItemReport, offset_s: float, now: float) -> ItemReport:
    """With instants on our clock, none of them in the future."""
    return replace(item, started=min(item.started + offset_s, now), ended=min(item.ended + offset_s, now))

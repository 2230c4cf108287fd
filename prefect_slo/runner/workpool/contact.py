"""What an office has to do with one pilot: a postman reads its mailbox, and tells the lease that it serves."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from prefect.logging import get_logger

from prefect_slo.control.events import LossReason
from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Bundle, Chatter, Finished, ItemReport, Lost, Opened, Progress, Sink
from prefect_slo.runner.notices import Notice
from prefect_slo.runner.workpool.mailbox import BEAT, FROM_JOB, TO_JOB, Incoming, Offset, Outgoing, Pulse, pause_s
from prefect_slo.runner.workpool.pilot import Letter, Order

CANCEL_S = 5.0
"""A worker that is to end what it runs says so within this; after that its lease is given up unheard."""

DRAIN_S = 1.0
"""What a job has sent before it ended may take this long to be seen."""

SILENT = 6
"""Heartbeats without a change after which the other side is taken for gone."""

if TYPE_CHECKING:
    from prefect_slo.runner.workpool.office import Office


class Owner(NamedTuple):
    """Whose a lease is.

    Attributes:
        backend: Number of the backend, and so of the flow run.
        stage: The stage there.
    """

    backend: int
    stage: str


@dataclass
class Lease:
    """What a backend asked for.

    Attributes:
        id: Its name for the one who asked.
        owner: Whose it is.
        size: Of the worker.
        sink: Hears of it.
        notice: Tells the user something.
        asked: When.
        starting_since: Since when a pilot starts for it, or could and is done without; ``None`` while neither holds:
            what it waits then is waiting for what others hold.
        started_s: How long either held before.
    """

    id: int
    owner: Owner
    size: Size
    sink: Sink
    notice: Notice
    asked: float
    starting_since: float | None = None
    started_s: float = 0.0

    def starts(self, now: float) -> None:
        """What it waits from now on is a start, or in place of one."""
        if self.starting_since is None:
            self.starting_since = now

    def stalls(self, since: float) -> None:
        """What it waits since then is neither."""
        self.started_s, self.starting_since = self.start_s(since), None

    def start_s(self, now: float) -> float:
        """How long it has waited for a start, or in place of one."""
        since = self.starting_since
        return self.started_s + (max(now - since, 0.0) if since is not None else 0.0)


class Contact:
    """A pilot as its office knows it; its mailbox is this thread's alone.

    Attributes:
        size: Of its worker.
        box: Its mailbox.
        born: When it was asked for.
        since: When its job was asked for, was first heard of, or has lost its worker: what comes next is waited for.
        heard_of: Whether its job is up.
        blocked_s: How long its pool could not start a job meanwhile.
        flow_run: Its job, once that has been asked for.
        lease: Who it serves.
        bundle: What it runs.
        ready: Whether its worker is up.
        idle_since: Since when nobody needs it.
        held_since: Since when its worker is up for the one whom it serves.
        gone: Set once nothing more is heard of it.
    """

    def __init__(self, office: Office, size: Size) -> None:
        self._office, self.size = office, size
        self.box = f"pilot-{uuid.uuid4().hex}"  # beside its office's, which is gone before the last letter is read
        self.born = self.since = self.idle_since = self.held_since = office.clock()
        self.blocked_s = self._blocked_before_s = 0.0
        self._unpaid_s = self._age_s = 0.0
        self.flow_run: UUID | None = None
        self.lease: Lease | None = None
        self.bundle: Bundle | None = None
        self.ready, self.gone = False, threading.Event()
        self._pid = self._generation = 0
        self._no_gpu = False
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

    @property
    def begun(self) -> bool:
        """Whether its worker has ever been up."""
        return self._pid != 0

    def order(self) -> Order:
        """What its job is told."""
        terms = self._office.terms
        return Order(
            storage=self._office.store.reference,
            box=self.box,
            office=self._office.box,
            size=asdict(self.size),
            idle_s=max(4 * self._office.keep_s, terms.give_up_s),  # its office sends it home before
            lifetime_s=2 * terms.lifetime_s,
            heartbeat_s=terms.heartbeat_s,
            silent_s=SILENT * terms.heartbeat_s,
            places_gpus=self._office.places_gpus,
        )

    def usable(self, size: Size) -> bool:
        """Whether it may serve a lease of that size."""
        young = self._office.clock() - self.born < self._office.terms.lifetime_s
        return self.size == size and young and not self._leaving and not self.gone.is_set() and self._job_ended is None

    def serve(self, lease: Lease, blocked_s: float = 0.0) -> None:
        """Belong to a lease from now on.

        Args:
            lease: The lease.
            blocked_s: How long its pool could not start the pilot that it has waited for in vain.
        """
        self.held_since = now = self._office.clock()
        self.lease, self._cancelled, self._blocked_before_s = lease, None, self.blocked_s
        if not self.ready:
            lease.starts(now)
            return
        self._unpaid_s += now - self.idle_since
        start_s = max(lease.start_s(now) - blocked_s, 0.0)
        self._opened(lease, start_s, now - lease.asked - start_s, cold=start_s > 0)

    def submit(self, bundle: Bundle) -> None:
        """Send a bundle on its way."""
        self.bundle, self._cancelled = bundle, None
        self._outbox.put((self._generation, bundle))

    def cancel(self) -> None:
        """End what it runs; its lease is lost once the worker says so, or doesn't."""
        self._cancelled = self._office.clock()
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
            self._job_ended = (why, self._office.clock())
            self.wake()

    def lose(self, reason: LossReason, detail: str) -> None:
        """It is gone, and with it what it had not reported."""
        office = self._office
        with office.lock:
            if self.gone.is_set():
                return
            self.gone.set()
            lease, bundle = self.lease, self.bundle
            self.lease = self.bundle = None
            self._leave_debts(lease)
            office.left(self)
        if lease is not None:
            lost = Lost(lease.id, reason, detail, bundle=bundle.id if bundle is not None else None)
            lease.sink(replace(lost, reason="cancelled", detail="cancelled") if self._cancelled is not None else lost)
        office.clear(self.box)
        if not self.heard_of:
            office.watch.call_off(self)

    # ---- the postman ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        store, quiet_since = self._office.store, self._office.clock()
        pulse = Pulse(quiet_since)
        felt, told = quiet_since, ""
        while not self.gone.is_set():
            quiet_s = self._office.clock() - quiet_since
            try:
                if self._send(pause_s(store, quiet_s)):
                    quiet_since = self._office.clock()
                while (letter := self._in.receive()) is not None:
                    quiet_since = self._office.clock()
                    self._read(letter, quiet_since)
                    if letter.over:
                        self.lose("died" if self.begun else "start", letter.over)
                if self._office.clock() - felt > self._office.terms.heartbeat_s:
                    felt = self._office.clock()
                    self._feel(pulse, felt)
                told = ""
            except Exception as error:
                if repr(error) != told:  # once for as long as it lasts
                    name = self._office.name
                    get_logger("slo").warning("A mailbox of work pool %r cannot be reached: %r", name, error)
                told = repr(error)
                time.sleep(1.0)
            self._mind(self._office.clock())

    def _send(self, wait_s: float) -> bool:
        if self._unsent is None:
            try:
                self._unsent = self._outbox.get(timeout=wait_s)
            except Empty:
                return False
        message = self._unsent  # sent again, under the same number, where writing it fails
        if isinstance(message, tuple) and isinstance(bundle := message[-1], Bundle):
            known = bundle.program_key in self._programs
            self._sent[bundle.id] = self._office.clock()
            self._out.send(("run", message[0], replace(bundle, program=None) if known else bundle))
            self._programs.add(bundle.program_key)
        elif message is not None:
            self._out.send(message)
        self._unsent = None
        return message is not None

    def _feel(self, pulse: Pulse, now: float) -> None:
        """Whether its job lives: one whose machine is gone may be Running for ever."""
        terms = self._office.terms
        silent_s = min(pulse.silent_s(self._office.store.read(self.box, BEAT), now), now - self.since)
        if self.heard_of and silent_s > SILENT * terms.heartbeat_s:
            why = f"its job has given no sign of life for {silent_s:.0f} s"
            self._office.watch.write_off(self, why)
            self.lose("died", why)

    def _mind(self, now: float) -> None:
        """What time brings."""
        office = self._office
        office.reconsider()
        if self._job_ended is not None and now - self._job_ended[1] > DRAIN_S + office.store.poll_s:
            self.lose("died" if self.begun else "start", self._job_ended[0])
        elif self._cancelled is not None and self.bundle is not None and now - self._cancelled > CANCEL_S:
            self.lose("cancelled", "cancelled")
            office.watch.call_off(self)
        elif self.lease is None and (self._leaving or (self.ready and now - self.idle_since >= office.keep_s)):
            self._go_home()
        elif self._leaving:  # in the middle of something
            self._cancelled = now
            self._go_home()

    def _go_home(self) -> None:
        office = self._office
        with office.lock:
            if self.gone.is_set() or (self.lease is not None and not self._leaving):
                return
            self._leaving = True
            lease, bundle = self.lease, self.bundle
            self.lease = self.bundle = None
            self._leave_debts(lease)
        if lease is not None:
            lease.sink(Lost(lease.id, "cancelled", "cancelled", bundle=bundle.id if bundle is not None else None))
        with contextlib.suppress(Exception):
            self._out.send(("close",))
        with office.lock:
            if not (lost := self.gone.is_set()):
                if not self.heard_of:
                    office.watch.call_off(self)
                self.gone.set()
                office.left(self)
        if lost:  # meanwhile, and its box was cleared before the letter came
            office.clear(self.box)

    # ---- letters ----------------------------------------------------------------------------------------------------

    def _read(self, letter: Letter, now: float) -> None:
        if not self.heard_of:
            self.heard_of, self.since = True, now
        if not self.begun:  # until its worker is up, all that its job has lived is its start
            self._unpaid_s, self._age_s = self._unpaid_s + letter.age_s - self._age_s, letter.age_s
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
        with office.lock:
            self._pid, self._generation, first = pid, report.lease, not self.begun
            self._no_gpu = report.no_gpu
            self.ready, self.idle_since, self.held_since = True, now, now
            self.blocked_s += report.wait_s if first else 0.0  # for its machine, which others held: no start
            lease = self.lease
        if first:
            office.started(max(now - self.born - self.blocked_s, 0.0))
        if lease is not None:
            blocked_s = self.blocked_s - self._blocked_before_s  # since the lease is its
            start_s = max(lease.start_s(now) - blocked_s, 0.0)
            self._opened(lease, start_s, now - lease.asked - start_s, cold=True)

    def _opened(self, lease: Lease, start_s: float, wait_s: float, *, cold: bool) -> None:
        lease.sink(Opened(lease.id, cold, start_s, wait_s, self._pid, self._paid_s(), self._no_gpu))

    def _worker_lost(self, report: Lost) -> None:
        office = self._office
        with office.lock:
            cancelled, self._cancelled = self._cancelled is not None, None
            self.ready, self.bundle, self.since = False, None, self._office.clock()
            if self.lease is None:
                return
            if report.reason == "cancelled" and not cancelled:  # that was for the lease before this one
                report = replace(report, reason="start", bundle=None)
            self._tell(report)
            office.release(self)

    def _paid_s(self) -> float:
        """What nobody has paid for of its time, and of that of pilots of its size which idled in vain: paid for now."""
        unpaid_s, self._unpaid_s = self._unpaid_s + self._office.debts(self.size), 0.0
        return unpaid_s

    def _leave_debts(self, lease: Lease | None) -> None:
        """Leave to the next lease of its size what nobody has paid for: what it idled, a start that came to nothing."""
        idle_s = self._office.clock() - self.idle_since if lease is None and self.ready else 0.0
        self._office.owe(self.size, self._unpaid_s + idle_s)
        self._unpaid_s = 0.0

    def _retire(self) -> None:
        """Take nothing new: whoever holds it has to ask for another."""
        with self._office.lock:
            self._leaving = True
            self._tell(Lost(0, "died", "its pilot has lived long enough"))
            self.lease, self.idle_since = None, self._office.clock()

    def _runs(self, bundle: int) -> bool:
        return self.bundle is not None and self.bundle.id == bundle

    def _tell(self, report: Any) -> None:
        if (lease := self.lease) is not None:
            lease.sink(replace(report, lease=lease.id))


def _moved(item: ItemReport, offset_s: float, now: float) -> ItemReport:
    """With instants on our clock, none of them in the future."""
    return replace(item, started=min(item.started + offset_s, now), ended=min(item.ended + offset_s, now))

"""The office: the pilots of one work pool for the flows of this process, each with a postman of its own.

A pilot that is given back stays warm for as long as starting another one takes (within a factor of two of the best that
could be done by one who knew the future), and serves the next lease of its size. Postmen read the mailboxes. A watch
asks the API for jobs and, gently, for what became of them: nothing depends on events being delivered, or on the API's
being there all the time. A heart gives the jobs the sign of life without which they end by themselves.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_logger

from prefect_slo.errors import WorkPoolUnusable
from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Bundle, Lost
from prefect_slo.runner.workpool.contact import Contact, Lease
from prefect_slo.runner.workpool.jobs import Jobs
from prefect_slo.runner.workpool.starting import Starts
from prefect_slo.runner.workpool.stores import Store

WAIT_AND_SEE = (408, 429)
"""Refusals of the API that say nothing of what was asked for."""

UNSTARTED = "has not started a job yet: look at its worker's log"
NO_ROOM = "has started them, and their workers wait for a share of their machine: others hold its GPUs or vCPUs"
"""Of jobs that are waited for: those that are not up, and those that are. The latter wait as long as it takes."""

LOOK_S = 2.0
"""Between two looks at the states of jobs."""


@dataclass(frozen=True)
class Terms:
    """How an office keeps its pilots.

    Attributes:
        concurrency: Pilots at once.
        idle_s: How long they stay warm; ``None``: as long as starting one has taken.
        lifetime_s: A pilot takes nothing new after this long.
        patience_s: How long a job may take to start, and its worker then, before the user hears of it.
        give_up_s: How long before those that wait for it are told that it does not start.
        heartbeat_s: Between two signs of life.
    """

    concurrency: int = 16
    idle_s: float | None = None
    lifetime_s: float = 3600.0
    patience_s: float = 60.0
    give_up_s: float = 900.0
    heartbeat_s: float = 5.0


class Office:
    """The pilots of one pool. Whom they serve, and whether they are gone, changes under ``lock`` alone.

    Args:
        name: The pool's name.
        jobs: The pool's jobs, for the watch alone.
        store: Where mailboxes are.
        variables: Job variables of a size.
        terms: How pilots are kept.
        context: In which the API is spoken to.
        places_gpus: Whether its jobs have the GPUs of their machine in common.
        clock: Tells the time in seconds.
    """

    def __init__(
        self,
        name: str,
        jobs: Jobs,
        store: Store,
        variables: Callable[[Size], Mapping[str, Any]],
        terms: Terms,
        context: Context,
        *,
        places_gpus: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.name, self.store, self.terms, self.places_gpus = name, store, terms, places_gpus
        self._jobs, self._variables = jobs, variables
        self.box = f"office-{uuid.uuid4().hex}"
        self.lock = threading.RLock()
        self._pilots: list[Contact] = []
        self._waiting: list[Lease] = []
        self._starts = Starts()
        self._owed_s: defaultdict[Size, float] = defaultdict(float)
        self._errands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._over = threading.Event()
        self._noticed, self._blocked = "", False
        self._called_off: list[str] = []
        self._looked = self.clock()
        self._heart = threading.Thread(target=self._beat, name="prefect-slo-heart", daemon=True)
        self._watch = threading.Thread(
            target=context.run, args=(self._look_after,), name="prefect-slo-watch", daemon=True
        )
        self._heart.start()
        self._watch.start()

    # ---- leases -----------------------------------------------------------------------------------------------------

    def open(self, lease: Lease) -> None:
        """Ask for a pilot of a size: a warm one, or one that has still to start."""
        with self.lock:
            self._waiting.append(lease)
            self._admit()

    def submit(self, lease: Lease, bundle: Bundle) -> None:
        """Hand a bundle to the pilot of a lease."""
        with self.lock:
            if (pilot := self._pilot_of(lease)) is not None:
                pilot.submit(bundle)

    def cancel(self, lease: Lease, detail: str = "cancelled") -> None:
        """End what a lease runs, and the lease."""
        with self.lock:
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
        with self.lock:
            if lease in self._waiting:
                self._waiting.remove(lease)
            elif (pilot := self._pilot_of(lease)) is not None:
                self.release(pilot)

    def holds(self, lease: Lease) -> bool:
        """Whether a lease is neither closed nor lost."""
        with self.lock:
            return lease in self._waiting or self._pilot_of(lease) is not None

    # ---- pilots -----------------------------------------------------------------------------------------------------

    @property
    def keep_s(self) -> float:
        """How long a pilot stays warm."""
        if self.terms.idle_s is not None:
            return self.terms.idle_s
        with self.lock:
            return 10.0 if math.isnan(took_s := self._starts.start_s) else took_s

    @property
    def pilots(self) -> tuple[Contact, ...]:
        """Those that start, run or idle now."""
        with self.lock:
            return tuple(self._pilots)

    def release(self, pilot: Contact) -> None:
        """A pilot is free; one of a size that nobody waits for idles, or makes room for one that is waited for."""
        with self.lock:
            lease, pilot.lease, pilot.idle_since = pilot.lease, None, self.clock()
            if pilot.ready and lease is not None:
                self._starts.held(lease.owner.stage, pilot.idle_since - pilot.held_since)
            self._admit()
            if pilot.lease is None:
                self._relieve(pilot)
        pilot.wake()

    def _relieve(self, pilot: Contact) -> None:
        """Have a warm pilot that is free serve a lease whose own is still starting; that one is a spare then."""
        if not pilot.ready:
            return
        for other in self._pilots:
            if (lease := other.lease) is not None and not other.ready and not other.begun:
                if not pilot.usable(lease.size):
                    continue
                other.lease, other.idle_since = None, self.clock()
                for_machine_s = other.idle_since - other.since if other.heard_of else 0.0
                pilot.serve(lease, other.blocked_s + for_machine_s)
                return

    def owe(self, size: Size, seconds: float) -> None:
        """A pilot of that size has been paid for so long without serving anybody."""
        with self.lock:
            self._owed_s[size] += seconds

    def debts(self, size: Size) -> float:
        """What pilots of a size have been paid for in vain and no lease has paid back: it does so now."""
        with self.lock:
            return self._owed_s.pop(size, 0.0)

    def started(self, took_s: float) -> None:
        """A pilot took so long to start."""
        with self.lock:
            self._starts.started(took_s)

    def left(self, pilot: Contact) -> None:
        """A pilot is gone or on its way."""
        with self.lock:
            if pilot in self._pilots:
                self._pilots.remove(pilot)
            self._admit()

    def reconsider(self) -> None:
        """Look again whether those that wait for a pilot that runs should have one of their own."""
        with self.lock:
            if self._waiting:
                self._admit()

    def _admit(self) -> None:
        """Serve who waits, first come first; who is better off with a pilot that gets free soon waits for that one.

        What is waited so is in place of a start, as far as one is possible then; else for what others hold.
        """
        patient: Counter[Size] = Counter()
        for lease in tuple(self._waiting):
            if self._over.is_set() or lease not in self._waiting:
                continue
            free = [pilot for pilot in self._pilots if pilot.lease is None and pilot.usable(lease.size)]
            if free:
                self._waiting.remove(lease)
                max(free, key=lambda pilot: (pilot.ready, pilot.idle_since)).serve(lease)
                continue
            now, full = self.clock(), len(self._pilots) >= self.terms.concurrency
            idle = [pilot for pilot in self._pilots if pilot.lease is None]
            if full and not idle:
                self._stall(now)
                return
            if not self._starts.worth_it(lease.start_s(now), self._held_by_others(lease, now), patient[lease.size]):
                patient[lease.size] += 1
                if not self._blocked:
                    lease.starts(now)
                continue
            if full:
                idle[0].leave()  # comes back here once it is out
                return
            self._waiting.remove(lease)
            pilot = Contact(self, lease.size)
            self._pilots.append(pilot)
            pilot.serve(lease)
            self._errands.put(lambda pilot=pilot: self._start(pilot))  # type: ignore[misc]

    def _held_by_others(self, lease: Lease, now: float) -> list[tuple[str, float]]:
        """By which stage each pilot is held that a lease may expect back, and for how long so far.

        Its own stage gives none back before it has nothing left to run, nor anything that the lease could.
        """
        return [
            (other.owner.stage, now - pilot.held_since)
            for pilot in self._pilots
            if (other := pilot.lease) is not None and other.owner != lease.owner
            if pilot.ready and pilot.usable(lease.size)
        ]

    def _stall(self, since: float) -> None:
        """No pilot could be started since then for who waits."""
        for lease in self._waiting:
            lease.stalls(since)

    def _pilot_of(self, lease: Lease) -> Contact | None:
        with self.lock:
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

    def _start(self, pilot: Contact) -> None:
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
            if isinstance(error, WorkPoolUnusable):
                pilot.lose("start", str(error))
                return
            code = getattr(getattr(error, "response", None), "status_code", 0)
            if (400 <= code < 500 and code not in WAIT_AND_SEE) or isinstance(error, ObjectNotFound):
                pilot.lose("start", f"its job in work pool {self.name!r} was refused: {error}")
                return
            if self.clock() - pilot.born > self.terms.give_up_s:
                pilot.lose("start", f"no job could be asked for in work pool {self.name!r}: {error!r}")
                return
            retry = threading.Timer(LOOK_S, self._errands.put, [lambda: self._start(pilot)])
            retry.daemon = True
            retry.start()

    def _ask_for(self, pilot: Contact) -> UUID:
        name = f"pilot-{self.name}-{pilot.box[-6:]}"
        return self._jobs.start(name, pilot.order(), self._variables(pilot.size))

    def _look(self) -> None:
        pilots = {pilot.flow_run: pilot for pilot in self.pilots if pilot.flow_run is not None}
        if not pilots:
            return
        states = self._jobs.states([flow_run for flow_run in pilots if flow_run is not None])
        looked, self._looked = self._looked, self.clock()
        scheduled = [run for run, state in states.items() if state is not None and state.type == StateType.SCHEDULED]
        for flow_run, pilot in pilots.items():
            state = states.get(flow_run) if flow_run is not None else None
            if flow_run not in states:
                pilot.job_ended("its flow run or its work pool was deleted")
            elif state is not None and state.is_final():
                words = f": {state.message}" if state.message else ""
                pilot.job_ended(f"its job has ended as {state.name}{words}")
            elif state is not None and state.type == StateType.SCHEDULED:
                self._call_off_spare(pilot)
        self._complain([pilot for pilot in pilots.values() if not pilot.ready and pilot.lease is not None])
        self._look_at_pool([pilots[flow_run] for flow_run in scheduled], looked)

    def _look_at_pool(self, scheduled: list[Contact], since: float) -> None:
        """Whether it can start jobs; what was waited for one since the look before is no start where it can't."""
        self._blocked = bool(scheduled or self._waiting) and self._jobs.blocked()
        if not self._blocked:
            return
        for pilot in scheduled:
            pilot.blocked_s += self._looked - max(since, pilot.born)
        with self.lock:
            self._stall(since)

    def _complain(self, starting: list[Contact]) -> None:
        now = self.clock()
        late = [pilot for pilot in starting if now - pilot.since > self.terms.patience_s]
        if not late:
            self._noticed = self._noticed if starting else ""
            return
        unheard = [pilot for pilot in late if not pilot.heard_of]
        late, missing = (unheard, UNSTARTED) if unheard else (late, NO_ROOM)
        trouble = (self._jobs.trouble() if unheard else "") or missing
        if self._noticed != missing:
            self._noticed = missing
            lease = late[0].lease
            if lease is not None:
                lease.notice(
                    f"{len(late)} jobs have waited {now - late[0].since:.0f} s: work pool {self.name!r} {trouble}."
                )
        for pilot in unheard:
            if now - pilot.born > self.terms.give_up_s:
                pilot.lose("start", f"work pool {self.name!r} {trouble}")

    def _call_off_spare(self, pilot: Contact) -> None:
        """Want a job no more that nobody has begun to start, where nobody waits for it by now."""
        with self.lock:
            if pilot.lease is None and not pilot.heard_of and not self._waiting:
                pilot.leave()

    def call_off(self, pilot: Contact) -> None:
        """Want a pilot's job no more, which may just be asked for; its box goes where it never started."""
        self._errands.put(lambda: self._call_off(pilot))

    def _call_off(self, pilot: Contact) -> None:
        if pilot.flow_run is None or self._jobs.cancel(pilot.flow_run):
            self.store.clear(pilot.box)
        else:
            self._called_off.append(pilot.box)

    def write_off(self, pilot: Contact, why: str) -> None:
        """A pilot's job is gone without having said so: no flow run is left running."""
        if (flow_run := pilot.flow_run) is not None:
            self._errands.put(lambda: self._jobs.crashed(flow_run, why))

    def clear(self, pilot: Contact) -> None:
        """Delete the mailbox of a pilot that is gone."""
        self._carefully(lambda: self.store.clear(pilot.box))

    # ---- the heart --------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        count, told = 0, ""
        while not self._over.is_set():
            count += 1
            try:
                self.store.write(self.box, "beat", f"{count}".encode())
                told = ""
            except Exception as error:
                if repr(error) != told:  # once for as long as it lasts
                    get_logger("slo").warning("Storage of work pool %r cannot be written: %r", self.name, error)
                told = repr(error)
            self._over.wait(self.terms.heartbeat_s)

    def shut(self, patience_s: float = 10.0) -> None:
        """Send every pilot home. Idempotent."""
        with self.lock:
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
        for box in (self.box, *self._called_off):  # of jobs that their worker ends, or that hear nothing and go
            self._carefully(lambda box=box: self.store.clear(box))  # type: ignore[misc]

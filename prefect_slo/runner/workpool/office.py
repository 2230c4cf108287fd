"""The office: the pilots of one work pool for the flows of this process, each with a postman of its own.

A pilot that is given back stays warm for as long as starting another one takes (within a factor of two of the best that
could be done by one who knew the future), and serves the next lease of its size. Postmen read the mailboxes, a watch
speaks to Prefect's API, and a heart gives the jobs the sign of life without which they end by themselves.
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
from typing import Any

from prefect.logging import get_logger

from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Bundle, Lost
from prefect_slo.runner.workpool.contact import Contact, Lease
from prefect_slo.runner.workpool.jobs import Jobs
from prefect_slo.runner.workpool.mailbox import Heart
from prefect_slo.runner.workpool.starting import Starts
from prefect_slo.runner.workpool.stores import Store
from prefect_slo.runner.workpool.watch import Watch


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

    Attributes:
        over: Set once it is shut.
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
        self.box = f"office-{uuid.uuid4().hex}"
        self.lock = threading.RLock()
        self._pilots: list[Contact] = []
        self._waiting: list[Lease] = []
        self._starts = Starts()
        self._owed_s: defaultdict[Size, float] = defaultdict(float)
        self.over = threading.Event()
        self._heart = Heart(store, self.box, terms.heartbeat_s, missed=self._missed_a_beat)
        self.watch = Watch(self, jobs, variables, context)

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

    @property
    def waited_for(self) -> bool:
        """Whether anybody waits for a pilot that has none of its own."""
        return bool(self._waiting)

    def stall(self, since: float) -> None:
        """No pilot could be started since then for who waits."""
        with self.lock:
            for lease in self._waiting:
                lease.stalls(since)

    def call_off_spare(self, pilot: Contact) -> None:
        """Want a pilot no more whose job nobody has begun to start, where nobody waits for it by now."""
        with self.lock:
            if pilot.lease is None and not pilot.heard_of and not self._waiting:
                pilot.leave()

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
            if self.over.is_set() or lease not in self._waiting:
                continue
            free = [pilot for pilot in self._pilots if pilot.lease is None and pilot.usable(lease.size)]
            if free:
                self._waiting.remove(lease)
                max(free, key=lambda pilot: (pilot.ready, pilot.idle_since)).serve(lease)
                continue
            now, full = self.clock(), len(self._pilots) >= self.terms.concurrency
            idle = [pilot for pilot in self._pilots if pilot.lease is None]
            if full and not idle:
                self.stall(now)
                return
            if not self._starts.worth_it(lease.start_s(now), self._held_by_others(lease, now), patient[lease.size]):
                patient[lease.size] += 1
                if not self.watch.blocked:
                    lease.starts(now)
                continue
            if full:
                idle[0].leave()  # comes back here once it is out
                return
            self._waiting.remove(lease)
            pilot = Contact(self, lease.size)
            self._pilots.append(pilot)
            pilot.serve(lease)
            self.watch.start(pilot)

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

    def _pilot_of(self, lease: Lease) -> Contact | None:
        with self.lock:
            return next((pilot for pilot in self._pilots if pilot.lease is lease), None)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def clear(self, box: str) -> None:
        """Delete a mailbox that nobody reads any more."""
        try:
            self.store.clear(box)
        except Exception as error:  # what stays behind is never read
            get_logger("slo").debug("A mailbox of work pool %r could not be deleted: %r", self.name, error)

    def shut(self, patience_s: float = 10.0) -> None:
        """Send every pilot home. Idempotent."""
        with self.lock:
            if self.over.is_set():
                return
            self.over.set()
            self._heart.stop()
            pilots, self._waiting = list(self._pilots), []
        for pilot in pilots:
            pilot.leave()
        deadline = time.monotonic() + patience_s
        for pilot in pilots:
            pilot.gone.wait(max(deadline - time.monotonic(), 0))
        self.watch.end(max(deadline - time.monotonic(), 0.1))
        self._heart.join(1.0)
        self.clear(self.box)

    def _missed_a_beat(self, error: Exception) -> None:
        get_logger("slo").warning("Storage of work pool %r cannot be written: %r", self.name, error)

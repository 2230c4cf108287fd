"""The pool: gives leases their workers, carries bundles to them and reports back, keeps limits, and ends everything.

One thread does all input and output for all workers; requests from other threads are noted under a lock, and the thread
is woken. Reports are posted by that thread alone, without the lock.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable
from typing import Any

from prefect_slo.control.events import LossReason
from prefect_slo.errors import InvalidValue
from prefect_slo.runner.backends.protocol import Bundle, Lost, Opened
from prefect_slo.runner.local import keeping
from prefect_slo.runner.local.crew import Crew
from prefect_slo.runner.local.gpu_ledger import GpuLedger
from prefect_slo.runner.local.gpus import environment
from prefect_slo.runner.local.keeping import PoolConfig
from prefect_slo.runner.local.launch import Ended, Forker, Notice, Unstarted
from prefect_slo.runner.local.ledger import Ledger
from prefect_slo.runner.local.limits import machine_memory_mb
from prefect_slo.runner.local.member import Fate, Lease, Worker
from prefect_slo.runner.local.post import Post, refuse
from prefect_slo.runner.local.seating import Seating
from prefect_slo.runner.local.session import Session
from prefect_slo.runner.local.setup import Birth

logger = logging.getLogger(__name__)

_SHUT_DOWN = "the backend was shut down"


class WorkerPool:
    """Workers of one process, shared by its leases.

    It wakes with its first lease, and rests when it has had neither leases nor workers for ``idle_s``.

    Args:
        config: How it keeps them.
        ledger: The machine's vCPUs.
        gpus: Its GPUs; by default those that there are, looked for when a size first asks for one.
        zygote: One that is there already; its first session takes it.
    """

    def __init__(
        self, config: PoolConfig, ledger: Ledger, gpus: GpuLedger | None = None, zygote: Forker | None = None
    ) -> None:
        self.config, self.ledger, self.zygote = config, ledger, zygote
        self._seating = Seating(ledger, gpus, gpu_devices=config.gpu_devices, patience_s=config.patience_s)
        self._lock = threading.RLock()
        self._settled = threading.Condition(self._lock)
        self._session: Session | None = None
        self._awake = self._stopping = False
        self._leases: set[Lease] = set()
        self._crew = Crew(self._lock, config.grace_s, self._wake)
        self._post = Post()
        self._active = 0.0
        self._memory_mb = machine_memory_mb()

    def open(self, lease: Lease) -> None:
        """Queue a lease for a share of the machine and a worker."""
        with self._lock:
            try:
                if not self._awake and not self._stopping:
                    zygote, self.zygote = self.zygote, None
                    self._session = Session(self.config, self._crew, self._serve, self._session, zygote)
                    self._awake = True
            except OSError as error:
                refuse(lease, f"no thread or socket could be had: {error}")
                return
            if self._stopping:
                refuse(lease, _SHUT_DOWN)
                return
            self._active = time.monotonic()
            self._leases.add(lease)
            try:
                keeping.check(lease.size, self._memory_mb)
                self._seating.join(lease)
            except InvalidValue as error:
                self._lose(lease, "start", str(error))
            self._wake()

    def submit(self, lease: Lease, bundle: Bundle) -> None:
        """Send a bundle to the lease's worker, from the caller's thread as far as the socket takes it.

        Raises:
            InvalidValue: The lease has no worker yet, or it runs a bundle already.
        """
        with self._lock:
            worker, session = lease.worker, self._session
            if lease.done:  # its loss has been told, or is about to be, without this bundle
                return
            if worker is None or session is None or worker.engaged:
                raise InvalidValue("lease", lease.id, "an opened lease that runs nothing")
            sent = worker.run(bundle)
            if not sent:
                self._crew.note_unsent(worker)
            if not sent or bundle.timeout_s is not None:
                self._wake()
        session.watch.wake()

    def cancel(self, lease: Lease, detail: str = "cancelled") -> None:
        """End a lease, and by force what it runs. ``Lost`` follows."""
        with self._lock:
            if not lease.done:
                self._cut(lease, detail)
                self._wake()

    def close(self, lease: Lease) -> None:
        """Give a lease back; a worker that runs nothing is kept."""
        with self._lock:
            if lease.done:
                return
            if lease.worker is not None and lease.worker.engaged:
                self._crew.doom(lease.worker, Fate("cancelled", "closed"))
            self._release(lease)
            self._wake()

    def settle(self, leases: Iterable[Lease], timeout_s: float) -> bool:
        """Wait until leases are done and their workers free or gone; ``False`` when that takes too long."""
        waited = list(leases)
        with self._settled:
            if self._session is None or threading.current_thread() is self._session.thread:
                return False
            return self._settled.wait_for(lambda: not any(self._unsettled(lease) for lease in waited), timeout_s)

    def stop(self) -> None:
        """End every worker and wait for it."""
        with self._lock:
            self._stopping, session = True, self._session
            self._wake()
        if session is not None and threading.current_thread() is not session.thread:
            session.thread.join(self.config.grace_s + 30)

    @property
    def stopped(self) -> bool:
        return self._stopping

    def pids(self) -> tuple[int, ...]:
        """Processes of its workers."""
        return self._crew.pids()

    # The I/O thread.

    def _serve(self, session: Session) -> None:
        """The I/O thread."""
        if session.previous is not None:
            session.previous.thread.join()
            session.previous = None
        try:
            while not self._over():
                for owner, readable, writable in session.line.wait(self._step(session)):
                    self._handle(session, owner, readable, writable)
        except Exception:
            logger.exception("The worker pool failed; its leases are lost.")
            self._abandon()
            self._post.deliver()
        finally:
            session.close()
            self._seating.give_back()
            self._post.deliver()

    def _step(self, session: Session) -> float | None:
        """Do what was noted and what is due; seconds until something else may be."""
        with self._lock:
            doomed = self._crew.take_doomed()
            for worker in self._crew.take_unsent():
                session.line.want_write(worker.sock, worker, True)
        for token in doomed:
            self._kill(session, token)
        self._seating.give_back()
        self._admit(session)
        due = min(self._keep_time(), self._seating.due)
        self._post.deliver()
        with self._lock:
            if self._crew.pending or self._seating.pending or self._post:
                return 0.0
        return None if due == math.inf else max(0.0, due - time.monotonic())

    def _handle(self, session: Session, owner: Any, readable: bool, writable: bool) -> None:
        if not isinstance(owner, Worker):
            for notice in session.nursery.receive(owner):
                self._notice(session, notice)
        elif not owner.hung_up:
            if writable:
                with self._lock:
                    if owner.flush():
                        session.line.want_write(owner.sock, owner, False)
            if readable:
                self._read(session, owner)
        self._post.deliver()

    def _admit(self, session: Session) -> None:
        """Give leases that have their seats their workers, in turn."""
        for lease, refusal in self._seating.serve():
            with self._lock:
                if refusal:
                    self._lose(lease, "start", refusal)
                elif not lease.done:
                    self._place(session, lease)

    def _keep_time(self) -> float:
        """End what has run too long, started too slowly or idled too long; when to look again."""
        now, next_look = time.monotonic(), math.inf
        with self._lock:
            if self._stopping:
                self._wind_up()
            for worker in self._crew:
                at, fate = keeping.due(worker, self.config, now)
                if now < at:
                    next_look = min(next_look, at)
                elif fate is not None:
                    self._crew.doom(worker, fate)
                else:
                    self._crew.dismiss(worker)
                    next_look = min(next_look, now + self.config.grace_s)
            warm = keeping.idle(self._crew)
            for worker in warm[: max(0, len(warm) - self.config.max_idle)]:
                self._crew.dismiss(worker)
            if self._crew or self._leases:
                self._active = now
            else:
                next_look = min(next_look, self._active + self.config.idle_s)
        return next_look

    def _over(self) -> bool:
        """Whether there is nothing left to do, for good or for now."""
        with self._lock:
            if self._crew or self._leases or self._post:
                return False
            if self._stopping or time.monotonic() >= self._active + self.config.idle_s:
                self._awake = False
            return not self._awake

    # Workers, from start to end.

    def _place(self, session: Session, lease: Lease) -> None:
        """Give a lease a warm worker, one of its size if there is one, or start one."""
        cores = lease.claim.cores if lease.claim is not None else ()
        worker = None
        if lease.gpus is None:  # what a process sees of GPUs is settled when it first uses one
            worker = keeping.fitting(self._crew, lease.size)
        if worker is None:
            for idle in keeping.in_the_way(self._crew, lease.size, self._memory_mb):
                self._crew.dismiss(idle)
            self._start(session, lease, cores)
            return
        if not worker.serve(lease, lease.surroundings.for_worker(lease.size.vcpus, self.config.overrides), cores):
            self._crew.note_unsent(worker)
        self._post.put(lease, Opened(lease.id, False, 0.0, lease.granted - lease.asked, worker.pid))

    def _start(self, session: Session, lease: Lease, cores: tuple[int, ...]) -> None:
        told = self.config.overrides
        if lease.gpus is not None:
            told |= environment(lease.gpus.share, lease.gpus.devices, lease.sharing)
        surroundings = lease.surroundings.for_worker(lease.size.vcpus, told)
        try:
            worker = session.nursery.bear(self._crew.token(), lease, surroundings, cores)
        except OSError as error:
            self._lose(lease, "start", f"no process could be started: {error}")
            return
        self._crew.join(worker)
        session.line.add(worker.sock, worker)
        self._crew.send(worker, Birth(surroundings, lease.size.vcpus, cores, self.config.preload))

    def _read(self, session: Session, worker: Worker) -> bool:
        """Take in what a worker has sent; ``False`` when there is no more for now."""
        try:
            frames = worker.receive()
        except BlockingIOError:
            return False
        if frames is None:
            self._hang_up(session, worker)
            return False
        for records in frames:
            with self._lock:
                self._take(worker, records)
        return True

    def _take(self, worker: Worker, records: list[tuple[Any, ...]]) -> None:
        lease, started = worker.lease, worker.note(records)
        if lease is None or lease.done:
            return
        if started:
            start_s = time.monotonic() - worker.born
            self._post.put(lease, Opened(lease.id, True, start_s, lease.granted - lease.asked, worker.pid))
        for report in worker.reports(records, lease):
            self._post.put(lease, report)
        if records[-1][0] == "finished":
            worker.bundle = None

    def _hang_up(self, session: Session, worker: Worker) -> None:
        """A worker's socket is done with; one that isn't about to leave is ended."""
        worker.hung_up = True
        session.line.remove(worker.sock)
        if worker.leaving is None:
            self._kill(session, worker.token)

    def _kill(self, session: Session, token: int) -> None:
        notice = session.nursery.kill(token)
        if notice is not None:
            self._notice(session, notice)

    def _notice(self, session: Session, notice: Notice) -> None:
        """A worker has ended, or could not be started."""
        worker = self._crew.get(notice.token)
        if worker is None:
            return
        status = notice.status if isinstance(notice, Ended) else None
        while not worker.hung_up and self._read(session, worker):
            pass
        with self._lock:
            if not self._crew.part(worker):
                return
            if not worker.hung_up:
                session.line.remove(worker.sock)
            lease = worker.lease
            if lease is not None and not lease.done:
                if isinstance(notice, Unstarted) and not notice.elsewhere:
                    worker.fate = worker.fate or Fate("start", notice.detail)
                if status is None and not worker.pid and worker.fate is None:  # its zygote failed: another way
                    self._start(session, lease, worker.cores)
                else:
                    self._post.put(lease, worker.loss(lease, status))
                    self._release(lease)
            if lease is None or lease.done:
                self._seating.vacate(worker.gpus)
            worker.close()
            self._settled.notify_all()

    # Leases, from open to over.

    def _cut(self, lease: Lease, detail: str) -> None:
        if lease.worker is not None and lease.worker.engaged:
            self._crew.doom(lease.worker, Fate("cancelled", detail))
        else:
            self._lose(lease, "cancelled", detail)

    def _lose(self, lease: Lease, reason: LossReason, detail: str) -> None:
        """A lease that runs nothing ends without its worker's end."""
        if not lease.done:
            self._post.put(lease, Lost(lease.id, reason, detail))
            self._release(lease)

    def _release(self, lease: Lease) -> None:
        """A lease is over: its share and, unless it is ending, its worker are free."""
        lease.done = True
        self._leases.discard(lease)
        self._seating.leave(lease)
        if (worker := lease.worker) is not None:
            worker.lease, worker.idle_since = None, time.monotonic()
            if worker.idle and (worker.bloated or worker.gpus is not None):
                self._crew.dismiss(worker)
        self._settled.notify_all()

    def _unsettled(self, lease: Lease) -> bool:
        worker = lease.worker
        return not lease.done or (worker is not None and worker.fate is not None and worker in self._crew)

    def _wind_up(self) -> None:
        for lease in list(self._leases):
            self._cut(lease, _SHUT_DOWN)
        for worker in keeping.idle(self._crew):
            self._crew.dismiss(worker)

    def _abandon(self) -> None:
        """The I/O thread failed: whatever was under way is lost."""
        with self._lock:
            self._stopping, self._awake = True, False
            for lease in list(self._leases):
                self._lose(lease, "died", "the worker pool failed; see the log")
            for worker in self._crew:
                worker.close()
                self._seating.vacate(worker.gpus)
            self._crew.clear()
            self._settled.notify_all()

    def _wake(self) -> None:
        if self._session is not None and self._awake:
            self._session.line.wake()

"""The pool: gives leases their workers, carries bundles to them and reports back, keeps limits, and ends everything.

One thread does all input and output for all workers; requests from other threads are noted under a lock, and the thread
is woken. Reports are posted by that thread alone, without the lock.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from prefect_slo.control.events import LossReason
from prefect_slo.errors import GpuShareTooLarge, InvalidValue
from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Bundle, Lost, Opened, Report, Sink
from prefect_slo.runner.local import keeping
from prefect_slo.runner.local.cgroup import MemoryGroup
from prefect_slo.runner.local.gpu_ledger import GpuClaim, GpuLedger
from prefect_slo.runner.local.gpus import devices, environment, mps_runs
from prefect_slo.runner.local.keeping import PoolConfig
from prefect_slo.runner.local.launch import Ended, Forker, Notice, Unstarted
from prefect_slo.runner.local.ledger import Claim, Ledger
from prefect_slo.runner.local.limits import machine_memory_mb, pin
from prefect_slo.runner.local.line import Line
from prefect_slo.runner.local.member import Fate, Lease, Worker
from prefect_slo.runner.local.memory import MemoryWatch
from prefect_slo.runner.local.nursery import Nursery
from prefect_slo.runner.local.page import Page
from prefect_slo.runner.local.patience import Patience
from prefect_slo.runner.local.setup import Birth

logger = logging.getLogger(__name__)

_POLL_S = 0.02  # between two looks at the ledger while a lease waits
_AGAIN_S = 5.0  # before a share of a GPU that could not be given back is given back again
_HEADROOM_MB = 64  # above what an idle worker holds, whatever its size says
_SHUT_DOWN = "the backend was shut down"


class Session:
    """What a pool has while it is awake: threads, a zygote, descriptors."""

    def __init__(self, pool: WorkerPool, previous: Session | None) -> None:
        self.line = Line()
        zygote, pool.zygote = pool.zygote, None
        self.nursery = Nursery(pool.config.start, pool.config.preload, self.line, zygote)
        self.watch = MemoryWatch(pool.busy, pool.seen, pool.exceeded)
        self.previous = previous
        self.thread = threading.Thread(target=pool.serve, args=(self,), name="prefect-slo-io", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.watch.close()
        self.nursery.close()
        self.line.close()


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
        self.config, self.ledger, self._gpus, self.zygote = config, ledger, gpus, zygote
        self._patience, self._gpu_patience = Patience(config.patience_s), Patience(config.patience_s)
        self._lock = threading.RLock()
        self._settled = threading.Condition(self._lock)
        self._session: Session | None = None
        self._awake = self._stopping = False
        self._opening: deque[Lease] = deque()
        self._seating: list[Lease] = []  # they wait for a share of a GPU before they wait for one of the machine
        self._leases: set[Lease] = set()
        self._workers: dict[int, Worker] = {}
        self._tokens = 0
        self._freed: list[Claim] = []
        self._freed_gpus: list[GpuClaim] = []
        self._unreleased: list[GpuClaim] = []
        self._asked_in_vain = False
        self._kills: list[int] = []
        self._unsent: set[int] = set()
        self._reports: deque[tuple[Sink, Report]] = deque()
        self._active = 0.0
        self._memory_mb = machine_memory_mb()

    def open(self, lease: Lease) -> None:
        """Queue a lease for a share of the machine and a worker."""
        with self._lock:
            try:
                if not self._awake and not self._stopping:
                    self._session = Session(self, self._session)
                    self._awake = True
            except OSError as error:
                self._refuse(lease, f"no thread or socket could be had: {error}")
                return
            if self._stopping:
                self._refuse(lease, _SHUT_DOWN)
                return
            self._active = time.monotonic()
            self._leases.add(lease)
            (self._seating if lease.size.gpu else self._opening).append(lease)
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
                self._unsent.add(worker.token)
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
                self._doom(lease.worker, Fate("cancelled", "closed"))
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

    @property
    def gpus(self) -> GpuLedger:
        """The GPUs of its workers."""
        if self._gpus is None:
            self._gpus = GpuLedger(devices(self.config.gpu_devices))
        return self._gpus

    def pids(self) -> tuple[int, ...]:
        """Processes of its workers."""
        with self._lock:
            return tuple(worker.pid for worker in self._workers.values() if worker.pid)

    # Called by the threads of a session.

    def serve(self, session: Session) -> None:
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
            self._deliver()
        finally:
            session.close()
            self._give_back()
            self._deliver()

    def busy(self) -> list[tuple[int, int, float, MemoryGroup | None]]:
        """Workers whose memory is to be watched: ``(token, pid, limit in MB, control group)``."""
        with self._lock:
            return [
                (worker.token, worker.pid, worker.limit_mb, worker.group)
                for worker in self._workers.values()
                if worker.bundle is not None and worker.fate is None
            ]

    def seen(self, token: int, used_mb: float) -> None:
        """A worker and what it has started hold this much."""
        with self._lock:
            if (worker := self._workers.get(token)) is not None:
                worker.peak_mb = max(worker.peak_mb, used_mb)

    def exceeded(self, token: int, used_mb: float) -> None:
        """A worker holds more than it may."""
        with self._lock:
            worker = self._workers.get(token)
            if worker is not None and worker.bundle is not None:
                self._doom(worker, Fate("memory", f"out of memory: {used_mb:.0f} MB used of {worker.limit_mb:.0f} MB"))
                self._wake()

    # The I/O thread's rounds.

    def _step(self, session: Session) -> float | None:
        """Do what was noted and what is due; seconds until something else may be."""
        with self._lock:
            kills, self._kills = self._kills, []
            for token in self._unsent:
                if (worker := self._workers.get(token)) is not None and not worker.hung_up:
                    session.line.want_write(worker.sock, worker, True)
            self._unsent.clear()
        for token in kills:
            self._kill(session, token)
        self._give_back()
        due = min(self._seat(), self._admit(session), self._keep_time())
        self._deliver()
        with self._lock:
            if self._kills or self._freed or self._freed_gpus or self._reports or self._unsent:
                return 0.0
        if self._unreleased:
            due = min(due, time.monotonic() + _AGAIN_S)
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
        self._deliver()

    def _seat(self) -> float:
        """Give leases their share of a GPU, in the order of the machine's line; when to look again.

        Always before a share of the machine: whoever holds that never waits for a GPU, so that no two wait for each
        other.
        """
        with self._lock:
            seating = list(self._seating)
        for lease in seating:
            try:
                self._check(lease.size)
                claim = self._gpu_claim(lease)
                held = self._held_of_gpus(lease)
            except (InvalidValue, GpuShareTooLarge) as error:
                with self._lock:
                    self._lose(lease, "start", str(error))
                continue
            except OSError as error:  # nobody goes without a GPU: it is asked again
                if not self._asked_in_vain:
                    logger.warning("The account of GPUs could not be asked (%s); what wants one waits.", error)
                self._asked_in_vain = True
                continue
            self._asked_in_vain = False
            with self._lock:
                if lease.done:  # cancelled meanwhile; giving a share back twice is harmless
                    self._freed_gpus.append(claim)
                    continue
                if claim.granted:
                    self._seating.remove(lease)
                    self._opening.append(lease)
                    lease.seated = time.monotonic()
                    self._gpu_patience.served(lease.seated)
                    continue
            if held:
                self._say_waiting(lease, held)
        with self._lock:
            return time.monotonic() + _POLL_S if self._seating else math.inf

    def _gpu_claim(self, lease: Lease) -> GpuClaim:
        """The lease's share of a GPU, asked for or asked again."""
        if lease.gpus is None:
            assert lease.size.share is not None  # only those that ask for one are seated
            claim = self.gpus.claim(lease.size.share)
            with self._lock:
                lease.gpus = claim
        else:
            self.gpus.retry(lease.gpus)
        return lease.gpus

    def _held_of_gpus(self, lease: Lease) -> str:
        """What of the devices is held, where it is time to say that a lease waits for it; else nothing."""
        assert lease.gpus is not None
        if lease.gpus.granted or self._gpu_patience.look(lease.asked, time.monotonic()) == "wait":
            return ""
        return ", ".join(f"{cores:g} of {name}" for name, (cores, _) in self.gpus.used().items()) or "nothing"

    def _say_waiting(self, lease: Lease, held: str) -> None:
        """A device is never overfilled, so a lease waits for as long as it takes; that is said now and again."""
        now = time.monotonic()
        if now - lease.asked >= self.config.patience_s:
            self._gpu_patience.served(now)
        logger.warning(
            "A worker has waited for %s for %.0f s (held: %s). It goes on waiting: other runs hold them, or more "
            "workers were asked for than fit.",
            lease.size.share,
            now - lease.asked,
            held,
        )

    def _admit(self, session: Session) -> float:
        """Give leases their share of the machine, in turn; when to look again."""
        while True:
            with self._lock:
                if not self._opening:
                    return math.inf
                lease = self._opening[0]
            try:
                self._check(lease.size)
                claim = self._claim(lease)
            except InvalidValue as error:
                with self._lock:
                    self._lose(lease, "start", str(error))
                continue
            with self._lock:
                if lease.done:  # cancelled meanwhile; giving a share back twice is harmless
                    self._freed.append(claim)
                    continue
                if not claim.granted and not self._go_without(lease, claim):
                    return time.monotonic() + _POLL_S
                self._opening.popleft()
                lease.granted = time.monotonic()
                self._patience.served(lease.granted)
                self._place(session, lease)

    def _keep_time(self) -> float:
        """End what has run too long, started too slowly or idled too long; when to look again."""
        now, next_look = time.monotonic(), math.inf
        with self._lock:
            if self._stopping:
                self._wind_up()
            for worker in self._workers.values():
                at, fate = keeping.due(worker, self.config, now)
                if now < at:
                    next_look = min(next_look, at)
                elif fate is not None:
                    self._doom(worker, fate)
                else:
                    self._dismiss(worker)
                    next_look = min(next_look, now + self.config.grace_s)
            warm = keeping.idle(self._workers.values())
            for worker in warm[: max(0, len(warm) - self.config.max_idle)]:
                self._dismiss(worker)
            if self._workers or self._leases:
                self._active = now
            else:
                next_look = min(next_look, self._active + self.config.idle_s)
        return next_look

    def _over(self) -> bool:
        """Whether there is nothing left to do, for good or for now."""
        with self._lock:
            if self._workers or self._leases or self._reports:
                return False
            if self._stopping or time.monotonic() >= self._active + self.config.idle_s:
                self._awake = False
            return not self._awake

    # Workers, from start to end.

    def _check(self, size: Size) -> None:
        if size.hardware != "cpu" and not size.gpu:
            raise InvalidValue("size", str(size), "hardware 'cpu', or a share of a GPU, on local worker processes")
        if size.memory_mb > self._memory_mb:
            raise InvalidValue("size.memory_mb", size.memory_mb, f"at most {self._memory_mb:.0f} MB, this machine's")

    def _claim(self, lease: Lease) -> Claim:
        """The lease's share of the machine, asked for or asked again."""
        try:
            if lease.claim is None:
                claim = self.ledger.claim(lease.size.vcpus)
                with self._lock:
                    lease.claim = claim
            else:
                self.ledger.retry(lease.claim)
        except OSError as error:
            logger.warning("The vCPU ledger could not be asked (%s); a lease goes without a share.", error)
            lease.claim = Claim.unaccounted(lease.size.vcpus)
        return lease.claim

    def _go_without(self, lease: Lease, claim: Claim) -> bool:
        """Whether a lease has waited for its share for so long that it goes without one."""
        verdict = self._patience.look(max(lease.asked, lease.seated), time.monotonic())
        if verdict == "wait":
            return False
        waits = (
            f"A worker of {lease.size.vcpus:g} vCPUs waits for its share of this machine, all of which other workers "
            f"hold (capacity: {self.ledger.capacity:g} vCPUs)."
        )
        if verdict == "say":
            logger.warning("%s It goes without one after %g s.", waits, self.config.patience_s)
            return False
        logger.warning(
            "%s It goes without one now, after %g s: more runs than was planned for.", waits, self.config.patience_s
        )
        self._freed.append(claim)
        lease.claim = Claim.unaccounted(lease.size.vcpus)
        return True

    def _place(self, session: Session, lease: Lease) -> None:
        """Give a lease a warm worker, one of its size if there is one, or start one."""
        cores = lease.claim.cores if lease.claim is not None else ()
        worker = None
        if lease.gpus is None:  # what a process sees of GPUs is settled when it first uses one
            worker = keeping.fitting(self._workers.values(), lease.size, _HEADROOM_MB)
        if worker is None:
            for idle in keeping.in_the_way(self._workers.values(), lease.size, self._memory_mb):
                self._dismiss(idle)
            self._start(session, lease, cores)
            return
        worker.lease, lease.worker, worker.before = lease, worker, worker.serial
        surroundings = lease.surroundings.for_worker(lease.size.vcpus, self.config.overrides)
        if surroundings != worker.surroundings or lease.size != worker.size:
            worker.resized(lease.size, _HEADROOM_MB)
            worker.surroundings = surroundings
            if not worker.send(("adopt", surroundings, lease.size.vcpus)):
                self._unsent.add(worker.token)
        if cores and cores != worker.cores:
            pin(worker.pid, cores)
            worker.cores = cores
        self._post(lease, Opened(lease.id, False, 0.0, lease.granted - lease.asked, worker.pid))

    def _start(self, session: Session, lease: Lease, cores: tuple[int, ...]) -> None:
        self._tokens += 1
        told = self.config.overrides
        if lease.gpus is not None:
            told |= environment(lease.gpus.share, lease.gpus.devices, mps=mps_runs())
        surroundings = lease.surroundings.for_worker(lease.size.vcpus, told)
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                ours.setblocking(False)
                page_fd = Page.allocate()
                worker = Worker(
                    self._tokens, lease.size, ours, Page(page_fd), time.monotonic(), surroundings, cores, lease=lease
                )
                try:
                    session.nursery.start(worker.token, theirs.fileno(), page_fd, surroundings)
                finally:
                    os.close(page_fd)
        except OSError as error:
            self._lose(lease, "start", f"no process could be started: {error}")
            return
        lease.worker = self._workers[worker.token] = worker
        worker.gpus = lease.gpus
        session.line.add(worker.sock, worker)
        if not worker.send(Birth(surroundings, lease.size.vcpus, cores, self.config.preload)):
            self._unsent.add(worker.token)

    def _read(self, session: Session, worker: Worker) -> bool:
        """Take in what a worker has sent; ``False`` when there is no more for now."""
        try:
            frames = worker.decoder.receive(worker.sock)
        except BlockingIOError:
            return False
        except OSError:
            frames = None
        except Exception:  # user code wrote to a descriptor that isn't its own
            logger.exception("A worker sent what can't be read; it is ended.")
            frames = None
        if frames is None:
            self._hang_up(session, worker)
            return False
        for records in frames:
            with self._lock:
                self._take(worker, records)
        return True

    def _take(self, worker: Worker, records: list[tuple[Any, ...]]) -> None:
        lease = worker.lease
        for record in records:
            match record:
                case ("hello", pid, resident_mb):
                    self._welcome(worker, pid, resident_mb)
                case ("broken", detail):
                    worker.fate = worker.fate or Fate("died", f"its program raised\n{detail}")
                case ("unopened", detail):
                    worker.fate = worker.fate or Fate("start", detail)
        if lease is None or lease.done:
            return
        for report in worker.reports(records, lease):
            self._post(lease, report)
        if records[-1][0] == "finished":
            worker.bundle = None

    def _welcome(self, worker: Worker, pid: int, resident_mb: float) -> None:
        worker.pid, worker.born_mb, worker.resident_mb = pid, resident_mb, resident_mb
        worker.group = MemoryGroup.make(worker.token)
        if worker.group is not None:
            worker.group.add(pid)
        worker.resized(worker.size, _HEADROOM_MB)
        lease, now = worker.lease, time.monotonic()
        if lease is not None and not lease.done:
            self._post(lease, Opened(lease.id, True, now - worker.born, lease.granted - lease.asked, pid))

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
        worker = self._workers.get(notice.token)
        if worker is None:
            return
        status = notice.status if isinstance(notice, Ended) else None
        while not worker.hung_up and self._read(session, worker):
            pass
        with self._lock:
            if self._workers.pop(worker.token, None) is None:
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
                    self._post(lease, worker.loss(lease, status))
                    self._release(lease)
            if worker.gpus is not None and (lease is None or lease.done):
                self._freed_gpus.append(worker.gpus)
            worker.close()
            self._settled.notify_all()

    def _dismiss(self, worker: Worker) -> None:
        """Let an idle worker end in an orderly way."""
        worker.leaving = time.monotonic() + self.config.grace_s
        if not worker.send(("bye",)):
            self._unsent.add(worker.token)

    def _doom(self, worker: Worker, fate: Fate) -> None:
        if worker.fate is None:
            worker.fate = fate
            self._kills.append(worker.token)

    # Leases, from open to over.

    def _cut(self, lease: Lease, detail: str) -> None:
        if lease.worker is not None and lease.worker.engaged:
            self._doom(lease.worker, Fate("cancelled", detail))
        else:
            self._lose(lease, "cancelled", detail)

    def _refuse(self, lease: Lease, detail: str) -> None:
        """A lease is lost when there is no I/O thread to say so."""
        lease.done = True
        report = Lost(lease.id, "start", detail)
        threading.Thread(target=lease.sink, args=(report,), name="prefect-slo-io", daemon=True).start()

    def _lose(self, lease: Lease, reason: LossReason, detail: str) -> None:
        """A lease that runs nothing ends without its worker's end."""
        if not lease.done:
            self._post(lease, Lost(lease.id, reason, detail))
            self._release(lease)

    def _release(self, lease: Lease) -> None:
        """A lease is over: its share and, unless it is ending, its worker are free."""
        lease.done = True
        self._leases.discard(lease)
        for line in (self._opening, self._seating):
            if lease in line:
                line.remove(lease)
        if lease.claim is not None:
            self._freed.append(lease.claim)
        if lease.gpus is not None and lease.worker is None:
            self._freed_gpus.append(lease.gpus)
        if (worker := lease.worker) is not None:
            worker.lease, worker.idle_since = None, time.monotonic()
            if worker.idle and (worker.bloated or worker.gpus is not None):
                self._dismiss(worker)
        self._settled.notify_all()

    def _give_back(self) -> None:
        """Release the shares of leases that are over."""
        with self._lock:
            freed, self._freed = self._freed, []
            freed_gpus, self._freed_gpus = [*self._unreleased, *self._freed_gpus], []
            self._unreleased = []
        for claim in freed:
            try:
                self.ledger.release(claim)
            except OSError as error:
                logger.warning("A share of the vCPU ledger could not be given back (%s).", error)
        for gpus in freed_gpus:
            try:
                self.gpus.release(gpus)
            except OSError as error:  # nobody goes without a GPU, so that this is tried again
                logger.warning("A share of a GPU could not be given back yet (%s).", error)
                self._unreleased.append(gpus)

    def _unsettled(self, lease: Lease) -> bool:
        worker = lease.worker
        return not lease.done or (worker is not None and worker.fate is not None and worker.token in self._workers)

    def _wind_up(self) -> None:
        for lease in list(self._leases):
            self._cut(lease, _SHUT_DOWN)
        for worker in keeping.idle(self._workers.values()):
            self._dismiss(worker)

    def _abandon(self) -> None:
        """The I/O thread failed: whatever was under way is lost."""
        with self._lock:
            self._stopping, self._awake = True, False
            for lease in list(self._leases):
                self._lose(lease, "died", "the worker pool failed; see the log")
            for worker in self._workers.values():
                worker.close()
                if worker.gpus is not None:
                    self._freed_gpus.append(worker.gpus)
            self._workers.clear()
            self._settled.notify_all()

    def _post(self, lease: Lease, report: Report) -> None:
        self._reports.append((lease.sink, report))

    def _deliver(self) -> None:
        """Post reports, in order, without the lock."""
        while True:
            with self._lock:
                if not self._reports:
                    return
                sink, report = self._reports.popleft()
            try:
                sink(report)
            except Exception:
                logger.exception("A sink raised on %s; the report is lost.", type(report).__name__)

    def _wake(self) -> None:
        if self._session is not None and self._awake:
            self._session.line.wake()

"""The pool: gives leases their workers, carries bundles to them and reports back, keeps limits, and ends everything.

One thread does all input and output for all workers; requests from other threads are noted under a lock, and the thread
is woken. Reports are posted by that thread alone, without the lock.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from prefect_slo.errors import InvalidValue
from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Bundle, LossReason, Lost, Opened, Report, Sink
from prefect_slo.runner.local.launch import Ended, Forker, Launcher, Notice, Spawner, StartMethod
from prefect_slo.runner.local.ledger import Claim, Ledger
from prefect_slo.runner.local.limits import machine_memory_mb, pin
from prefect_slo.runner.local.member import Fate, Lease, Worker
from prefect_slo.runner.local.memory import MemoryWatch
from prefect_slo.runner.local.page import Page
from prefect_slo.runner.local.setup import Birth, Surroundings

logger = logging.getLogger(__name__)

_POLL_S = 0.02  # between two looks at the ledger while a lease waits
_HEADROOM_MB = 64  # above what an idle worker holds, whatever its size says
_ZYGOTES = 3  # lost ones before workers are started one by one


@dataclass(frozen=True)
class PoolConfig:
    """How a pool starts and keeps its workers.

    Attributes:
        env: Environment of workers beyond the parent's own, as sorted pairs.
        preload: Modules that workers find imported.
        start: ``zygote`` forks workers from one clean process (Linux), ``spawn`` starts an interpreter each,
            ``auto`` takes the first where it works.
        idle_s: A worker that nobody has used for this long is ended.
        max_idle: Workers kept warm at once; the one used least recently goes first.
        grace_s: How long workers may take to end when told to.
        start_timeout_s: How long they may take to start.
    """

    env: tuple[tuple[str, str], ...] = ()
    preload: tuple[str, ...] = ()
    start: StartMethod = "auto"
    idle_s: float = 60.0
    max_idle: int = 16
    grace_s: float = 5.0
    start_timeout_s: float = 60.0

    @property
    def overrides(self) -> dict[str, str]:
        return dict(self.env)


class WorkerPool:
    """Workers of one process, shared by its leases.

    Args:
        config: How it keeps them.
        ledger: The machine's vCPUs.

    Attributes:
        ledger: The same.
        sink_errors: Reports whose sink raised.
    """

    def __init__(self, config: PoolConfig, ledger: Ledger) -> None:
        self.config, self.ledger, self.sink_errors = config, ledger, 0
        self._lock = threading.RLock()
        self._opening: deque[Lease] = deque()
        self._leases: set[Lease] = set()
        self._workers: dict[int, Worker] = {}
        self._tokens = 0
        self._freed: list[Claim] = []
        self._kills: list[int] = []
        self._unsent: set[int] = set()
        self._reports: deque[tuple[Sink, Report]] = deque()
        self._stopping: float | None = None
        self._memory_mb = machine_memory_mb()
        self._spawner: Spawner | None = None
        self._forker: Forker | None = None
        self._zygotes_left = 0 if config.start == "spawn" or not zygote_possible() else _ZYGOTES
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._watch = MemoryWatch(self._busy, self._seen, self._exceeded)
        self._settled = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._serve, name="prefect-slo-io", daemon=True)
        self._thread.start()

    def open(self, lease: Lease) -> None:
        """Queue a lease for a share of the machine and a worker."""
        with self._lock:
            self._leases.add(lease)
            if self._stopping is not None:
                self._lose(lease, "start", "the backend was shut down")
            else:
                self._opening.append(lease)
        self.wake()

    def submit(self, lease: Lease, bundle: Bundle) -> None:
        """Send a bundle to the lease's worker, from the caller's thread as far as the socket takes it.

        Raises:
            InvalidValue: The lease has no worker yet, or it runs a bundle already.
        """
        with self._lock:
            worker = lease.worker
            if lease.done:  # lost a moment ago: nothing of this bundle was started
                untouched = tuple(item for item, _ in bundle.items)
                self._post(lease, Lost(lease.id, "died", "the lease was lost before", None, untouched))
                self.wake()
                return
            if worker is None or not worker.pid or worker.bundle is not None:
                raise InvalidValue("lease", lease.id, "an opened lease that runs nothing")
            if not worker.run(bundle):
                self._unsent.add(worker.token)
                self.wake()
            if bundle.timeout_s is not None:
                self.wake()
        self._watch.wake()

    def cancel(self, lease: Lease, detail: str = "cancelled") -> None:
        """End a lease, and by force what it runs. ``Lost`` follows."""
        with self._lock:
            worker = lease.worker
            if lease.done:
                return
            if worker is not None and (worker.bundle is not None or not worker.pid):
                self._doom(worker, Fate("cancelled", detail))
            else:
                self._lose(lease, "cancelled", detail)
        self.wake()

    def close(self, lease: Lease) -> None:
        """Give a lease back; a worker that runs nothing is kept."""
        with self._lock:
            worker = lease.worker
            if lease.done:
                return
            if worker is not None and (worker.bundle is not None or not worker.pid):
                self._doom(worker, Fate("cancelled", "closed"))
            self._release(lease)
        self.wake()

    def wait_for(self, leases: Iterable[Lease], timeout_s: float) -> bool:
        """Wait until leases are done and their workers free or gone; ``False`` when that takes too long."""
        waited = list(leases)
        if threading.current_thread() is self._thread:
            return False
        with self._settled:
            return self._settled.wait_for(
                lambda: all(lease.done and (lease.worker is None or not self._dying(lease.worker)) for lease in waited),
                timeout_s,
            )

    def stop(self) -> None:
        """End every worker and wait for it."""
        with self._lock:
            if self._stopping is None:
                self._stopping = time.monotonic() + self.config.grace_s
        self.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(self.config.grace_s + 30)

    def wake(self) -> None:
        """Have the I/O thread look at what was noted."""
        with contextlib.suppress(OSError):  # full: it is awake; closed: it has ended
            self._wake.send(b"\0")

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def empty(self) -> bool:
        """Whether it has neither workers nor leases."""
        with self._lock:
            return not self._workers and not self._leases

    def pids(self) -> tuple[int, ...]:
        """Processes of its workers."""
        with self._lock:
            return tuple(worker.pid for worker in self._workers.values() if worker.pid)

    # What follows runs in the I/O thread, or under the lock.

    def _serve(self) -> None:
        try:
            while not self._finished():
                timeout = self._step()
                for key, events in self._selector.select(timeout):
                    self._handle(key, events)
        finally:
            self._end()

    def _step(self) -> float | None:
        """Do what was noted and what is due; seconds until something else may be."""
        with self._lock:
            kills, self._kills = self._kills, []
            freed, self._freed = self._freed, []
            for token in self._unsent:
                if (worker := self._workers.get(token)) is not None and not worker.hung_up:
                    self._selector.modify(worker.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, worker)
            self._unsent.clear()
        for token in kills:
            self._kill(token)
        for claim in freed:
            self.ledger.release(claim)
        due = min(self._admit(), self._keep_time())
        self._deliver()
        with self._lock:
            if self._kills or self._freed or self._reports:
                return 0.0
        return None if due == math.inf else max(0.0, due - time.monotonic())

    def _handle(self, key: selectors.SelectorKey, events: int) -> None:
        owner = key.data
        try:
            if owner is None:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
            elif isinstance(owner, Worker):
                self._exchange(owner, events)
            else:
                for notice in owner.receive():
                    self._notice(notice)
                if isinstance(owner, Forker) and not owner.alive:
                    self._drop_forker(owner)
        except Exception:
            logger.exception("A worker's message could not be handled; the worker is ended.")
            if isinstance(owner, Worker):
                self._hang_up(owner)
        self._deliver()

    def _admit(self) -> float:
        """Give leases their share of the machine, in turn; when to look again."""
        while True:
            with self._lock:
                if not self._opening:
                    return math.inf
                lease = self._opening[0]
            try:
                self._check(lease.size)
                if lease.claim is None:
                    claim = self.ledger.claim(lease.size.vcpus)
                    with self._lock:
                        lease.claim = claim
                        if lease.done:
                            self._freed.append(claim)
                            continue
                else:
                    self.ledger.retry(lease.claim)
            except InvalidValue as error:
                with self._lock:
                    self._lose(lease, "start", str(error))
                continue
            except OSError as error:
                logger.warning("The vCPU ledger failed (%s); a lease goes without a share.", error)
                lease.claim = Claim(-1, lease.size.vcpus, (-1,))
            if not lease.claim.granted:
                return time.monotonic() + _POLL_S
            with self._lock:
                if not lease.done:
                    self._opening.popleft()
                    lease.granted = time.monotonic()
                    self._place(lease, tuple(core for core in lease.claim.cores if core >= 0))

    def _check(self, size: Size) -> None:
        if size.gpu or size.hardware != "cpu":
            raise InvalidValue("size", str(size), "hardware 'cpu' without a GPU share on local worker processes")
        if size.memory_mb > self._memory_mb:
            raise InvalidValue("size.memory_mb", size.memory_mb, f"at most {self._memory_mb:.0f} MB, this machine's")

    def _place(self, lease: Lease, cores: tuple[int, ...]) -> None:
        """Give a lease the warm worker of its size that was used last, or start one."""
        warm = [worker for worker in self._idle() if worker.size == lease.size]
        if not warm:
            self._make_room(lease.size)
            self._start(lease, cores)
            return
        worker = max(warm, key=lambda worker: worker.idle_since)
        worker.lease, lease.worker, worker.before = lease, worker, worker.serial
        surroundings = lease.surroundings.for_worker(lease.size.vcpus, self.config.overrides)
        if surroundings != worker.surroundings:
            worker.surroundings = surroundings
            if not worker.send(("adopt", surroundings)):
                self._unsent.add(worker.token)
        if cores and cores != worker.cores:
            pin(worker.pid, cores)
            worker.cores = cores
        self._post(lease, Opened(lease.id, False, 0.0, lease.granted - lease.asked, worker.pid))

    def _start(self, lease: Lease, cores: tuple[int, ...]) -> None:
        self._tokens += 1
        surroundings = lease.surroundings.for_worker(lease.size.vcpus, self.config.overrides)
        birth = Birth(surroundings, lease.size.vcpus, cores, self.config.preload)
        fds: list[int] = []
        try:
            launcher = self._launcher(surroundings)
            ours, theirs = socket.socketpair()
            with theirs:
                page_fd = Page.allocate()
                fds.append(page_fd)
                ours.setblocking(False)
                worker = Worker(
                    token=self._tokens,
                    size=lease.size,
                    sock=ours,
                    page=Page(page_fd),
                    born=time.monotonic(),
                    surroundings=surroundings,
                    cores=cores,
                    spawned=isinstance(launcher, Spawner),
                    lease=lease,
                )
                launcher.spawn(worker.token, theirs.fileno(), page_fd, surroundings)
        except OSError as error:
            self._lose(lease, "start", f"no process could be started: {error}")
            return
        finally:
            for fd in fds:
                os.close(fd)
        lease.worker = self._workers[worker.token] = worker
        self._selector.register(worker.sock, selectors.EVENT_READ, worker)
        if not worker.send(birth):
            self._unsent.add(worker.token)

    def _launcher(self, surroundings: Surroundings) -> Launcher:
        if self._zygotes_left:
            if self._forker is None:
                self._forker = Forker(self.config.preload, surroundings)
                self._selector.register(self._forker, selectors.EVENT_READ, self._forker)
            return self._forker
        if self._spawner is None:
            self._spawner = Spawner()
            self._selector.register(self._spawner, selectors.EVENT_READ, self._spawner)
        return self._spawner

    def _drop_forker(self, forker: Forker) -> None:
        self._selector.unregister(forker)
        forker.close()
        self._forker = None
        self._zygotes_left -= 1

    def _exchange(self, worker: Worker, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            with self._lock:
                if worker.flush():
                    self._selector.modify(worker.sock, selectors.EVENT_READ, worker)
        if events & selectors.EVENT_READ:
            self._read(worker)

    def _read(self, worker: Worker) -> bool:
        """Take in what a worker has sent; ``False`` when there is no more for now."""
        try:
            frames = worker.decoder.receive(worker.sock)
        except BlockingIOError:
            return False
        except OSError:
            frames = None
        if frames is None:
            self._hang_up(worker)
            return False
        for records in frames:
            with self._lock:
                self._take(worker, records)
        return True

    def _take(self, worker: Worker, records: list[tuple[object, ...]]) -> None:
        lease = worker.lease
        for record in records:
            match record:
                case ("hello", int(pid), float(resident_mb)):
                    self._welcome(worker, pid, resident_mb)
                case ("broken", str(detail)):
                    worker.fate = worker.fate or Fate("died", f"its program raised\n{detail}")
                case ("unopened", str(detail)):
                    worker.fate = worker.fate or Fate("start", detail)
        if lease is None or lease.done:
            return
        for report in worker.reports(records, lease):
            self._post(lease, report)
        if records[-1][0] == "finished":
            worker.bundle = None

    def _welcome(self, worker: Worker, pid: int, resident_mb: float) -> None:
        worker.pid, worker.resident_mb = pid, resident_mb
        worker.limit_mb = max(float(worker.size.memory_mb), resident_mb + _HEADROOM_MB)
        lease, now = worker.lease, time.monotonic()
        if lease is not None and not lease.done:
            self._post(lease, Opened(lease.id, True, now - worker.born, lease.granted - lease.asked, pid))

    def _hang_up(self, worker: Worker) -> None:
        """A worker's socket is done with; one that isn't about to leave is ended."""
        if not worker.hung_up:
            worker.hung_up = True
            self._selector.unregister(worker.sock)
        if worker.leaving is None:
            self._kill(worker.token)

    def _kill(self, token: int) -> None:
        if (worker := self._workers.get(token)) is not None:
            launcher = self._spawner if worker.spawned else self._forker
            if launcher is not None:
                launcher.kill(token)

    def _notice(self, notice: Notice) -> None:
        with self._lock:
            worker = self._workers.get(notice.token)
        if worker is None:
            return
        if isinstance(notice, Ended):
            while not worker.hung_up and self._read(worker):
                pass
        lost_with_zygote = not isinstance(notice, Ended) or (notice.status is None and not worker.pid)
        with self._lock:
            del self._workers[worker.token]
            if not worker.hung_up:
                self._selector.unregister(worker.sock)
            lease = worker.lease
            if lease is not None and not lease.done:
                if lost_with_zygote and worker.fate is None:
                    logger.info("No zygote (%s); the worker is started by itself.", getattr(notice, "detail", "ended"))
                    self._zygotes_left = 0
                    self._start(lease, worker.cores)
                else:
                    self._post(lease, worker.loss(lease, notice.status if isinstance(notice, Ended) else None))
                    self._release(lease)
            worker.close()
            self._settled.notify_all()

    def _keep_time(self) -> float:
        """End what has run too long, started too slowly or idled too long; when to look again."""
        now, due = time.monotonic(), math.inf
        with self._lock:
            if self._stopping is not None:
                self._wind_up()
            for worker in list(self._workers.values()):
                due = min(due, self._keep_time_of(worker, now))
            idle = sorted(self._idle(), key=lambda worker: worker.idle_since)
            for worker in idle[: max(0, len(idle) - self.config.max_idle)]:
                self._dismiss(worker)
        return due

    def _keep_time_of(self, worker: Worker, now: float) -> float:
        config = self.config
        if worker.fate is not None:
            return math.inf
        if worker.leaving is not None:
            due, fate = worker.leaving, Fate("cancelled", "it did not leave when told to")
        elif not worker.pid:
            due = worker.born + config.start_timeout_s
            fate = Fate("start", f"it had not reported after {config.start_timeout_s:g} s")
        elif worker.bundle is not None:
            timeout_s = worker.bundle.timeout_s
            if timeout_s is None:
                return math.inf
            reading = worker.reading()
            due = (reading.instant if reading.running else now) + timeout_s
            fate = Fate("timeout", f"an item ran longer than {timeout_s:g} s", reading.started - 1)
        elif worker.lease is None:
            due = worker.idle_since + config.idle_s
            if now >= due:
                self._dismiss(worker)
                return worker.leaving or now
            return due
        else:
            return math.inf
        if now >= due:
            self._doom(worker, fate)
            return now
        return due

    def _wind_up(self) -> None:
        for lease in list(self._leases):
            worker = lease.worker
            if worker is None or (worker.pid and worker.bundle is None):
                self._lose(lease, "cancelled", "the backend was shut down")
            else:
                self._doom(worker, Fate("cancelled", "the backend was shut down"))
        for worker in self._idle():
            self._dismiss(worker)

    def _idle(self) -> list[Worker]:
        return [
            worker
            for worker in self._workers.values()
            if worker.lease is None and worker.pid and worker.leaving is None and worker.fate is None
        ]

    def _make_room(self, size: Size) -> None:
        """Dismiss idle workers, the least recently used first, while memory would not suffice for one of ``size``."""
        idle = sorted(self._idle(), key=lambda worker: worker.idle_since)
        leased = sum(worker.limit_mb or worker.size.memory_mb for worker in self._workers.values() if worker.lease)
        while idle and leased + sum(worker.resident_mb for worker in idle) + size.memory_mb > self._memory_mb:
            self._dismiss(idle.pop(0))

    def _dismiss(self, worker: Worker) -> None:
        """Let an idle worker end in an orderly way."""
        worker.leaving = time.monotonic() + self.config.grace_s
        if not worker.send(("bye",)):
            self._unsent.add(worker.token)

    def _doom(self, worker: Worker, fate: Fate) -> None:
        if worker.fate is None:
            worker.fate = fate
            self._kills.append(worker.token)

    def _lose(self, lease: Lease, reason: LossReason, detail: str) -> None:
        """A lease that runs nothing ends without its worker's end."""
        self._post(lease, Lost(lease.id, reason, detail))
        self._release(lease)

    def _release(self, lease: Lease) -> None:
        """A lease is over: its share and, unless it is ending, its worker are free."""
        lease.done = True
        self._leases.discard(lease)
        if lease in self._opening:
            self._opening.remove(lease)
        if lease.claim is not None:
            self._freed.append(lease.claim)
        if (worker := lease.worker) is not None:
            worker.lease, worker.idle_since = None, time.monotonic()
        self._settled.notify_all()

    def _dying(self, worker: Worker) -> bool:
        return worker.fate is not None and worker.token in self._workers

    def _post(self, lease: Lease, report: Report) -> None:
        self._reports.append((lease.sink, report))

    def _deliver(self) -> None:
        while True:
            with self._lock:
                if not self._reports:
                    return
                sink, report = self._reports.popleft()
            try:
                sink(report)
            except Exception:
                self.sink_errors += 1
                logger.exception("A sink raised on %s; the report is lost.", type(report).__name__)

    def _busy(self) -> list[tuple[int, int, float]]:
        with self._lock:
            return [
                (worker.token, worker.pid, worker.limit_mb)
                for worker in self._workers.values()
                if worker.bundle is not None and worker.fate is None
            ]

    def _seen(self, token: int, used_mb: float) -> None:
        with self._lock:
            if (worker := self._workers.get(token)) is not None:
                worker.peak_mb = max(worker.peak_mb, used_mb)

    def _exceeded(self, token: int, used_mb: float) -> None:
        with self._lock:
            worker = self._workers.get(token)
            if worker is None or worker.bundle is None:
                return
            self._doom(worker, Fate("memory", f"out of memory: {used_mb:.0f} MB used of {worker.limit_mb:.0f} MB"))
        self.wake()

    def _finished(self) -> bool:
        with self._lock:
            return self._stopping is not None and not self._workers and not self._leases and not self._reports

    def _end(self) -> None:
        self._watch.close()
        for launcher in (self._forker, self._spawner):
            if launcher is not None:
                launcher.close()
        with self._lock:
            freed, self._freed = self._freed, []
        for claim in freed:
            self.ledger.release(claim)
        for sock in (self._woken, self._wake):
            sock.close()
        self._selector.close()


def zygote_possible() -> bool:
    """Whether this system lets a process fork another and pass descriptors in packets (Linux)."""
    return hasattr(os, "fork") and hasattr(socket, "SOCK_SEQPACKET") and os.path.exists("/proc/self/task")

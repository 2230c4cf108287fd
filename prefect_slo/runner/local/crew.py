"""The crew: the workers of a pool, what the I/O thread has still to do about them, and what watching them has shown."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import count

from prefect_slo.runner.local.cgroup import MemoryGroup
from prefect_slo.runner.local.member import Fate, Worker


class Crew:
    """Workers by their tokens, from being started to being reaped. Under the pool's lock.

    Args:
        lock: The pool's; the thread that watches memory takes it here.
        grace_s: How long a worker may take to leave when told to.
        wake: Has the I/O thread look at what was noted.
    """

    def __init__(self, lock: threading.RLock, grace_s: float, wake: Callable[[], None]) -> None:
        self._lock, self._grace_s, self._wake = lock, grace_s, wake
        self._workers: dict[int, Worker] = {}
        self._tokens = count(1)
        self._doomed: list[int] = []
        self._unsent: set[int] = set()

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def __contains__(self, worker: Worker) -> bool:
        return worker.token in self._workers

    def get(self, token: int) -> Worker | None:
        """The worker of that token; ``None`` where it has ended."""
        return self._workers.get(token)

    def token(self) -> int:
        """For the next worker."""
        return next(self._tokens)

    def join(self, worker: Worker) -> None:
        """A worker was started."""
        self._workers[worker.token] = worker

    def part(self, worker: Worker) -> bool:
        """A worker has ended; whether that is new."""
        return self._workers.pop(worker.token, None) is not None

    def clear(self) -> None:
        """Know none any more."""
        self._workers.clear()

    def pids(self) -> tuple[int, ...]:
        """Their processes."""
        with self._lock:
            return tuple(worker.pid for worker in self if worker.pid)

    # What the I/O thread has to do.

    def dismiss(self, worker: Worker) -> None:
        """Let an idle worker end in an orderly way."""
        worker.leaving = time.monotonic() + self._grace_s
        self.send(worker, ("bye",))

    def doom(self, worker: Worker, fate: Fate) -> None:
        """Have a worker ended, for the first reason that there is."""
        if worker.fate is None:
            worker.fate = fate
            self._doomed.append(worker.token)

    def send(self, worker: Worker, message: object) -> None:
        """Write to a worker as far as its socket takes it; the I/O thread writes the rest."""
        if not worker.send(message):
            self.note_unsent(worker)

    def note_unsent(self, worker: Worker) -> None:
        """Have the I/O thread write what a worker's socket did not take."""
        self._unsent.add(worker.token)

    @property
    def pending(self) -> bool:
        """Whether there is something to do."""
        return bool(self._doomed or self._unsent)

    def take_doomed(self) -> list[int]:
        """Tokens of workers to end now."""
        doomed, self._doomed = self._doomed, []
        return doomed

    def take_unsent(self) -> list[Worker]:
        """Workers whose sockets to wait for until they take more."""
        unsent, self._unsent = self._unsent, set()
        workers = (self._workers.get(token) for token in unsent)
        return [worker for worker in workers if worker is not None and not worker.hung_up]

    # For the thread that watches memory.

    def busy(self) -> list[tuple[int, int, float, MemoryGroup | None]]:
        """Workers whose memory is to be watched: ``(token, pid, limit in MB, control group)``."""
        with self._lock:
            return [
                (worker.token, worker.pid, worker.limit_mb, worker.group)
                for worker in self
                if worker.bundle is not None and worker.fate is None
            ]

    def seen(self, token: int, used_mb: float) -> None:
        """A worker and what it has started hold this much."""
        with self._lock:
            if (worker := self.get(token)) is not None:
                worker.peak_mb = max(worker.peak_mb, used_mb)

    def exceeded(self, token: int, used_mb: float) -> None:
        """A worker holds more than it may."""
        with self._lock:
            worker = self.get(token)
            if worker is not None and worker.bundle is not None:
                self.doom(worker, Fate("memory", f"out of memory: {used_mb:.0f} MB used of {worker.limit_mb:.0f} MB"))
                self._wake()

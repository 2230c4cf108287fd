"""The thread backend: items run in threads of the flow's own process: I/O-bound tasks, and what cannot be pickled."""

from __future__ import annotations

import os
import time
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import psutil

from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import (
    Bundle,
    Capabilities,
    Chatter,
    Finished,
    ItemReport,
    Lost,
    Opened,
    Progress,
    RunItem,
    Sink,
)

GATHER_S = 0.003
"""Outcomes of tiny items are reported together, at most this late."""


class ThreadBackend:
    """Runs bundles in daemon threads; one backend per flow run.

    Threads share the interpreter: ``Size`` is not enforced, and a running item can't be ended. ``cancel`` drops what
    the thread has not started; the item that runs is left to end by itself, unheard.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._leases: dict[int, _Worker] = {}
        self._idle: list[_Worker] = []
        self._closed = False

    def capabilities(self) -> Capabilities:
        return Capabilities(
            isolated=False,
            hard_timeouts=False,
            memory_limits=False,
            vcpu_limits=False,
            vcpus=float("inf"),
            memory_mb=psutil.virtual_memory().total / 2**20,
        )

    def open(self, lease: int, size: Size, sink: Sink) -> None:
        with self._lock:
            if self._closed:
                sink(Lost(lease, "start", "the thread backend is shut down"))
                return
            worker = self._idle.pop() if self._idle else None
            worker = worker or _Worker()
            worker.lease, worker.sink = lease, sink
            self._leases[lease] = worker
        sink(Opened(lease, cold=False, start_s=0.0, wait_s=0.0, pid=os.getpid()))

    def submit(self, lease: int, bundle: Bundle) -> None:
        self._leases[lease].inbox.put(bundle)

    def cancel(self, lease: int) -> None:
        with self._lock:
            worker = self._leases.pop(lease, None)
        if worker is not None:
            worker.abandon()

    def close(self, lease: int) -> None:
        with self._lock:
            worker = self._leases.pop(lease, None)
            if worker is not None:
                self._idle.append(worker)

    def shutdown(self) -> None:
        with self._lock:
            self._closed = True
            workers = [*self._idle, *self._leases.values()]
            self._idle, self._leases = [], {}
        for worker in workers:
            worker.inbox.put(None)


class _Worker:
    """One thread, its inbox, and the programs that it has open."""

    def __init__(self) -> None:
        self.lease = 0
        self.sink: Sink = _unheard
        self.inbox: SimpleQueue[Bundle | None] = SimpleQueue()
        self._programs: dict[str, RunItem] = {}
        self._abandoned = False
        self._bundle: Bundle | None = None
        self._begun = 0  # items of the bundle that were started
        Thread(target=self._run, name="prefect-slo-worker", daemon=True).start()

    def abandon(self) -> None:
        """Report the lease as lost and hear nothing more of it; the thread ends after the item that it is in."""
        sink, self.sink, self._abandoned = self.sink, _unheard, True
        self.inbox.put(None)
        bundle, begun = self._bundle, self._begun
        items = [item for item, _ in bundle.items] if bundle is not None else []
        running = items[begun - 1] if begun else None
        sink(
            Lost(
                self.lease,
                "cancelled",
                "cancelled",
                running,
                tuple(items[begun:]),
                bundle=bundle.id if bundle is not None else None,
            )
        )

    def _run(self) -> None:
        while (bundle := self.inbox.get()) is not None:
            self._run_bundle(bundle)

    def _run_bundle(self, bundle: Bundle) -> None:
        received, cpu = time.monotonic(), time.thread_time()
        lease, sink = self.lease, self.sink
        self._bundle, self._begun = bundle, 0
        run = self._programs.get(bundle.program_key)
        if run is None:
            self._programs.clear()  # one flow run at a time: what it held is let go
            try:
                run = bundle.program.open(lambda payload: sink(Chatter(lease, payload)))
            except Exception as error:
                untouched = tuple(item for item, _ in bundle.items)
                sink(
                    Lost(
                        lease, "start", f"its program could not be opened: {error!r}", None, untouched, bundle=bundle.id
                    )
                )
                return
            self._programs[bundle.program_key] = run
        opened = time.monotonic()
        gathered: list[ItemReport] = []
        sent = opened
        for item, payload in bundle.items:
            if self._abandoned:
                return
            self._begun += 1
            started = time.monotonic()
            outcome = run(item, payload)
            ended = time.monotonic()
            gathered.append(ItemReport(item, outcome, started, ended))
            if ended - sent >= GATHER_S:
                self.sink(Progress(lease, bundle.id, tuple(gathered)))
                gathered, sent = [], ended
        if gathered:
            self.sink(Progress(lease, bundle.id, tuple(gathered)))
        self._bundle, self._begun = None, 0
        self.sink(
            Finished(
                lease,
                bundle.id,
                received=received,
                ended=time.monotonic(),
                open_s=opened - received,
                cpu_s=time.thread_time() - cpu,
            )
        )


def _unheard(_: Any) -> None:
    """The sink of a thread that nobody listens to any more."""

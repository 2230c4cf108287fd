"""Writes the records of tiny items behind the run, a few at a time while it lasts and the rest when it is over.

An event costs this process about 0.6 ms and a server on SQLite 5-17 ms. Sent as fast as thousands of tiny items end,
they hold up the flow's own work, and then its last state: a busy SQLite answers 503, and Prefect's client comes back
after 2, 4, 8 … seconds.
"""

from __future__ import annotations

import threading
from contextvars import Context
from queue import SimpleQueue
from weakref import WeakSet

from prefect.events.worker import EventsWorker
from prefect.logging import get_logger

from prefect_slo.runner.engine import Ended, record

BURST = 5
"""Records written in one go while the flow runs."""

REST_S = 0.1
"""Pause between bursts: 50 records a second, which SQLite digests beside other work."""


LAST_S = 60.0
"""An interpreter that shuts down waits this long for records at most."""


class WriteBehind:
    """A thread that emits the records it is given; an interpreter that shuts down lets it finish first.

    Args:
        context: The flow's context, for this thread alone.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._queue: SimpleQueue[Ended | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._failures = 0

    def add(self, ended: Ended) -> None:
        """Have the end of a call recorded, sooner or later."""
        self._queue.put(ended)
        if self._thread is None:
            self._context.run(EventsWorker.instance)  # registers its own end at exit: ours comes later, so runs first
            self._thread = threading.Thread(target=self._run, name="prefect-slo-records", daemon=True)
            self._thread.start()
            _finish_at_exit(self)

    def close(self) -> None:
        """Nothing more will come; what is left is written at once, without waiting for it here."""
        self._over.set()
        self._queue.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait until everything is written."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        written = 0
        while (ended := self._queue.get()) is not None:
            try:
                self._context.run(record, ended)
            except Exception:
                self._failures += 1
                if self._failures == 1:
                    get_logger("slo").warning("Some task runs could not be recorded.", exc_info=True)
            written += 1
            if written % BURST == 0:
                self._over.wait(REST_S)


_WRITING: WeakSet[WriteBehind] = WeakSet()
_registered = False


def _finish_at_exit(writer: WriteBehind) -> None:
    global _registered
    _WRITING.add(writer)
    if not _registered:
        _registered = True
        # Before threading's own shutdown, as concurrent.futures and Prefect do: atexit proper comes after Prefect's
        # events service has been drained.
        threading._register_atexit(_finish_all)  # type: ignore[attr-defined]


def _finish_all() -> None:
    for writer in list(_WRITING):
        writer.close()
        writer.join(LAST_S)

"""Learning goes on behind the flows: one thread of the process works off what ended runs leave to do.

Nothing is lost where the process dies before that: each run's observations are in the API by then, and a later run of
the flow, in whatever process, learns from them.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context

from prefect.context import AsyncClientContext, SyncClientContext

EXIT_S = 10.0
"""A process that ends waits so long for what is left to do: a fold and a new plan take one or two seconds."""


class Background:
    """Jobs that run one after another on a thread of their own, which ends when there are none left."""

    def __init__(self) -> None:
        self._jobs: deque[tuple[Context, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def soon(self, job: Callable[[], None]) -> None:
        """Run a job, which must not raise, in a copy of this context; returns at once."""
        context = copy_context()
        context.run(_leave_clients)
        with self._changed:
            self._jobs.append((context, job))
            if self._thread is None or not self._thread.is_alive():  # not alive: this process is a fork of that one
                self._thread = threading.Thread(target=self._work, name="prefect-slo-learning", daemon=True)
                self._thread.start()

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is left to do; whether that was reached in time."""
        with self._changed:
            if self._thread is threading.current_thread():
                return False  # a job that waits for itself
            return self._changed.wait_for(lambda: self._thread is None, timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._thread = None
                    self._changed.notify_all()
                    return
                context, job = self._jobs.popleft()
            context.run(job)


def _leave_clients() -> None:
    """Forget the API clients of the flow run: Prefect closes them at its end, and would still hand them out."""
    for kept in (SyncClientContext, AsyncClientContext):
        kept.__var__.set(None)  # type: ignore[arg-type]


_BACKGROUND = Background()


def soon(job: Callable[[], None]) -> None:
    """Run a job behind the flow; see ``Background``."""
    _at_exit()
    _BACKGROUND.soon(job)


def settle(timeout_s: float | None = None) -> bool:
    """Wait until what ended runs have left to learn is learned; whether that was reached in time.

    Flows return before that. Whoever wants to see at once what a run has taught (a sweep, a test, a script that prints
    the report) waits here.

    Args:
        timeout_s: How long to wait at most; for ever by default.
    """
    return _BACKGROUND.settle(timeout_s)


_registered = threading.Lock()


def _at_exit() -> None:
    """Once: have the interpreter wait for us, as long as threads and event loops still work."""
    if not _registered.acquire(blocking=False):
        return
    # atexit callbacks come after concurrent.futures has closed, and with it what HTTP clients need for names of hosts
    register: Callable[..., object] = getattr(threading, "_register_atexit", atexit.register)
    register(settle, EXIT_S)

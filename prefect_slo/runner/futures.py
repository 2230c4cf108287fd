"""Futures of calls, and the threads that their users' callbacks run in.

The thread that runs a flow completes futures, and must never wait for one: so it only says that a future is done. What
users have added by ``add_done_callback`` may take its time, submit more and wait for that.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any
from uuid import UUID

from prefect.futures import PrefectConcurrentFuture, PrefectFuture, PrefectTaskRunFuture
from prefect.logging import get_logger

RELIEF_S = 0.1
"""A callback that takes longer no longer holds up those behind it: it may wait for one of them."""


class CallFuture(PrefectConcurrentFuture[Any]):
    """The future of a call; callbacks run in a thread of their own, in the context that they were added in.

    Args:
        task_run_id: Its task run.
        wrapped_future: Completed with the final state.
        callbacks: Where callbacks run.
    """

    def __init__(self, task_run_id: UUID, wrapped_future: Future[Any], callbacks: Callbacks) -> None:
        super().__init__(task_run_id, wrapped_future)
        self._callbacks = callbacks

    def add_done_callback(self, fn: Callable[[PrefectFuture[Any]], None]) -> None:
        """Have ``fn`` called with this future when it is done; at once, in this thread, where it is already."""
        if self.wrapped_future.done():
            super().add_done_callback(fn)
            return
        context = copy_context()
        super().add_done_callback(lambda future: self._callbacks.add(lambda: context.run(fn, future)))


class RaisedFuture(PrefectTaskRunFuture[Any]):
    """Stands in a worker process for a future whose run raised instead of ending in a state.

    Args:
        task_run_id: Its task run.
        error: What it raises, here as there.
    """

    def __init__(self, task_run_id: UUID, error: BaseException) -> None:
        super().__init__(task_run_id)
        self._error = error

    def wait(self, timeout: float | None = None) -> None:
        raise self._error

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> Any:
        raise self._error

    def add_done_callback(self, fn: Callable[[PrefectFuture[Any]], None]) -> None:
        fn(self)


class Callbacks:
    """Runs callbacks one after another in the order that they come, past those that are stuck.

    Args:
        idle: Called when none is left, from the thread of the last one.
    """

    def __init__(self, idle: Callable[[], None] = lambda: None) -> None:
        self._idle = idle
        self._lock = threading.Lock()
        self._queue: deque[Callable[[], None]] = deque()
        self._outstanding = self._begun = self._turn = 0
        self._served = self._watched = False

    @property
    def outstanding(self) -> int:
        """Callbacks that wait or run."""
        return self._outstanding

    def add(self, callback: Callable[[], None]) -> None:
        """Run a callback in its turn; what it raises is logged, as with any future."""
        with self._lock:
            self._queue.append(callback)
            self._outstanding += 1
            if not self._served:
                self._serve()
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._watch, name="prefect-slo-callbacks-watch", daemon=True).start()

    def _serve(self) -> None:
        self._served, self._turn = True, self._turn + 1
        threading.Thread(target=self._run, args=(self._turn,), name="prefect-slo-callbacks", daemon=True).start()

    def _run(self, turn: int) -> None:
        while True:
            with self._lock:
                if turn != self._turn:  # it took too long over its last one, and another serves now
                    return
                if not self._queue:
                    self._served = False
                    return
                callback = self._queue.popleft()
                self._begun += 1
            try:
                callback()
            except BaseException:
                get_logger("slo").exception("A callback of a future raised.")
            with self._lock:
                self._outstanding -= 1
                last = not self._outstanding
            if last:
                self._idle()

    def _watch(self) -> None:
        """Have another thread take over while the one that serves is stuck and something waits behind it."""
        seen = -1
        while True:
            time.sleep(RELIEF_S)
            with self._lock:
                if not self._queue:
                    self._watched = False
                    return
                if self._begun == seen:
                    self._serve()
                seen = self._begun

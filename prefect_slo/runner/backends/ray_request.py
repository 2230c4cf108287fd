"""What this process asks of Ray's autoscaler ahead of need: one sum for all its flow runs, told to ``ray_keeper``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from prefect_slo.runner.backends.ray_keeper import Shape, keeper
from prefect_slo.runner.notices import Notice

PAUSES_S = (0.2, 1.0)
"""Between attempts: a keeper that nobody asked for anything ends, which may be just when it is asked."""


class _Run(NamedTuple):
    """What a flow run asks for, and how to tell its user something."""

    shapes: Sequence[Shape]
    notice: Notice


class Request:
    """This process' request, added up over its flow runs.

    Args:
        keeper: The actor that is told.
        job: This process by Ray's id, as long as it is connected.
        pause: Lets seconds pass.
    """

    def __init__(
        self,
        keeper: Callable[[], Any] = keeper,
        job: Callable[[], str] | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._keeper, self._connected_as, self._pause = keeper, job or _job, pause
        self._lock = threading.Lock()
        self._job = ""
        self._of: dict[object, _Run] = {}
        self._told: list[Shape] | None = []

    def make(self, run: object, shapes: Sequence[Shape], notice: Notice) -> None:
        """Ask for what a flow run needs in place of what it needed before. Waits for nothing, and never raises.

        Args:
            run: Stands for the flow run.
            shapes: What its workers take.
            notice: Tells its user why that could not be.
        """
        with self._lock:
            if not shapes and run not in self._of:
                return
            self._of[run] = _Run(shapes, notice)
            try:
                self._as_job(self._connected_as(), run)
                self._tell()
            except Exception as error:
                self._failed(error)
            finally:
                if not shapes:
                    del self._of[run]

    def _as_job(self, job: str, run: object) -> None:
        """What was asked for other runs while this process was connected as another job is over."""
        if job != self._job:
            self._job, self._of, self._told = job, {run: self._of[run]}, []

    def _tell(self, attempt: int = 0) -> None:
        shapes: list[Shape] = [dict(shape) for run in self._of.values() for shape in run.shapes]
        if shapes == self._told and not attempt:
            return
        self._told = shapes

        def heard(reply: Future[str]) -> None:  # in a thread of Ray's, which must not wait
            if (error := reply.exception()) is None:
                self._say(reply.result())
            else:
                threading.Thread(target=self._again, args=(job, attempt, error), daemon=True).start()

        job = self._job
        told: Any = self._keeper().ask.remote(job, shapes)
        told.future().add_done_callback(heard)

    def _again(self, job: str, attempt: int, error: BaseException) -> None:
        """After a pause, ask once more for what is asked for by then; or give up."""
        if attempt < len(PAUSES_S):
            self._pause(PAUSES_S[attempt])
        with self._lock:  # which whoever disconnects takes first
            if not self._of or job != self._job:
                return
            if attempt == len(PAUSES_S):
                self._failed(error)
                return
            try:
                self._tell(attempt + 1)
            except Exception as raised:
                self._failed(raised)

    def _failed(self, error: BaseException) -> None:
        """Nobody knows what was heard: what is asked for next is told, even if it is the same."""
        self._told = None
        self._say(f"Ray's autoscaler can't be told ahead of need ({type(error).__name__}: {error}).")

    def _say(self, words: str) -> None:
        """To every flow run that asks for something."""
        for run in list(self._of.values()) if words else ():
            run.notice(words)


def _job() -> str:
    """This process by Ray's id, as long as it is connected."""
    import ray

    return str(ray.get_runtime_context().get_job_id())


REQUEST = Request()
"""Of this process."""

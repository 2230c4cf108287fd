"""What this process asks of Ray's autoscaler ahead of need: one sum for all its flow runs, told to ``ray_keeper``."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from prefect_slo.runner.backends.ray_keeper import Shape, keeper

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""A keeper that nobody asked for anything ends, which may be just when it is asked."""


class Request:
    """This process' request, added up over its flow runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._job = ""
        self._of: dict[object, Sequence[Shape]] = {}
        self._told: list[Shape] = []
        self._said: set[str] = set()

    def make(self, run: object, shapes: Sequence[Shape]) -> None:
        """Ask for what a flow run needs in place of what it needed before. Waits for nothing, and never raises."""
        with self._lock:
            if not shapes and run not in self._of:
                return
            try:
                self._as_job(_job())
                self._of = {other: theirs for other, theirs in self._of.items() if other is not run}
                if shapes:
                    self._of[run] = shapes
                self._tell()
            except Exception as error:
                self._failed(error)

    def _as_job(self, job: str) -> None:
        """What was asked while this process was connected as another job is over."""
        if job != self._job:
            self._job, self._of, self._told = job, {}, []

    def _tell(self, attempt: int = 1) -> None:
        shapes: list[Shape] = [dict(shape) for each in self._of.values() for shape in each]
        if shapes == self._told and attempt == 1:
            return
        self._told = shapes

        def heard(reply: Future[str]) -> None:  # in a thread of Ray's, which must not wait
            if (error := reply.exception()) is None:
                self._say(reply.result())
            elif attempt < ATTEMPTS:
                threading.Thread(target=self._again, args=(job, attempt + 1), daemon=True).start()
            else:
                self._failed(error)

        job = self._job
        told: Any = keeper().ask.remote(job, shapes)
        told.future().add_done_callback(heard)

    def _again(self, job: str, attempt: int) -> None:
        with self._lock:  # which whoever disconnects takes first
            if self._of and job == self._job:
                try:
                    self._tell(attempt)
                except Exception as error:
                    self._failed(error)

    def _failed(self, error: BaseException) -> None:
        self._say(f"Ray's autoscaler can't be told ahead of need ({type(error).__name__}: {error}).")

    def _say(self, words: str) -> None:
        if words and words not in self._said:
            self._said.add(words)
            logger.warning(words)


def _job() -> str:
    """This process by Ray's id, as long as it is connected."""
    import ray

    return str(ray.get_runtime_context().get_job_id())


REQUEST = Request()
"""Of this process."""

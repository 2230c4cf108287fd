"""Jobs that are asked for at about the same time become one array job: one request for up to ten thousand of them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from prefect_slo.aws.s3 import S3Prefix

MOST = 10_000
"""Jobs of an array, at most."""


class Submitter:
    """Submits jobs, those of one moment together.

    Args:
        submit: Calls ``SubmitJob`` with the arguments that it gets, and returns the job's id.
        store: Where the list of an array's events lies, which each of its jobs looks its own up in.
        gather_s: How long a moment is. A job takes a minute or more to start: a quarter of a second is nothing.
        wait: Waits; a test may pass its own.
    """

    def __init__(
        self,
        submit: Callable[..., str],
        store: S3Prefix,
        gather_s: float,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._submit, self._store, self._gather_s, self._wait = submit, store, gather_s, wait
        self._asked: list[tuple[str, str, Future[str]]] = []
        self._lock = threading.Lock()

    def job(self, name: str, where: str) -> str:
        """Have a job run the event at a key; returns the job's id, which is one of an array's where others came along.

        Whoever comes first waits a moment for others and asks for them all.

        Raises:
            Exception: Whatever asking for them has raised.
        """
        mine: Future[str] = Future()
        with self._lock:
            self._asked.append((name, where, mine))
            leads = len(self._asked) == 1
        if leads:
            self._wait(self._gather_s)
            with self._lock:
                asked, self._asked = self._asked, []
            for at in range(0, len(asked), MOST):
                self._send(asked[at : at + MOST])
        return mine.result()

    def _send(self, asked: list[tuple[str, str, Future[str]]]) -> None:
        try:
            ids = self._ids(asked)
        except BaseException as error:
            for _, _, waiting in asked:
                waiting.set_exception(error)
            return
        for (_, _, waiting), job in zip(asked, ids, strict=True):
            waiting.set_result(job)

    def _ids(self, asked: list[tuple[str, str, Future[str]]]) -> list[str]:
        name, where, _ = asked[0]
        if len(asked) == 1:
            return [self._submit(name, self._uri(f"{where}/event"))]
        events = [self._uri(f"{one}/event") for _, one, _ in asked]
        self._store.put(f"{where}/array", json.dumps(events).encode())
        array = self._submit(name, self._uri(f"{where}/array"), arrayProperties={"size": len(asked)})
        return [f"{array}:{at}" for at in range(len(asked))]

    def _uri(self, key: str) -> str:
        return f"s3://{self._store.bucket}/{key}"

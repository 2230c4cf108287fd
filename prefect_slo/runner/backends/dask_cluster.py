"""A Dask cluster, as ``ClusterBackend`` uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from prefect_slo.resources import Size
from prefect_slo.runner.backends.cluster import Fetch
from prefect_slo.runner.backends.remote import Reply, Work, cancel_here, needed, run_here

if TYPE_CHECKING:
    from distributed import Client, Future


DIRECT_BYTES = 2**20
"""What is larger goes to a worker directly, past the scheduler."""


class DaskCluster:
    """Bundles as tasks of a Dask scheduler.

    Args:
        make: Makes the client, and says how to close it with what it has started.
        resources: By quantity of a size (``vcpus``, ``memory_mb``, ``gpu``), the resource of the cluster's workers that
            it takes of. Without any, a bundle takes one thread of a worker.
    """

    def __init__(self, make: Callable[[], tuple[Client, Callable[[], None]]], resources: Mapping[str, str]) -> None:
        self._make, self._resources = make, resources
        self._client: Any = None
        self._disconnect: Callable[[], None] = lambda: None

    def connect(self) -> None:
        """Make the client."""
        self._client, self._disconnect = self._make()

    def lack(self, size: Size) -> str:
        """What no worker has of the resources that a size takes."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        needs = needed(size, self._resources)
        if not workers or any(all(w["resources"].get(n, 0) >= v for n, v in needs.items()) for w in workers):
            return ""
        most = {name: max(worker["resources"].get(name, 0) for worker in workers) for name in needs}
        wanted = ", ".join(f"{name}={value:g} (the most: {most[name]:g})" for name, value in needs.items())
        flags = " ".join(f"{name}={value:g}" for name, value in needs.items())
        return f"no Dask worker has {wanted}: start workers with --resources '{flags}'"

    def start(self, work: Work, done: Callable[[Fetch], None]) -> Future:
        """Submit a task."""
        resources = needed(work.size, self._resources) or None
        large = sum(len(payload) for _, payload in work.bundle.items) > DIRECT_BYTES
        there = large and bool(self._client.scheduler_info(n_workers=-1)["workers"])
        sent = self._client.scatter(work, hash=False, direct=True) if there else work
        future: Future = self._client.submit(run_once, sent, key=work.token, pure=False, retries=0, resources=resources)

        def over(_: Future) -> None:  # in a thread of the client's: a large reply keeps no other lease waiting
            try:
                reply: Reply | str = future.result()
            except BaseException as error:
                reply = f"{type(error).__name__}: {error}"
            future.release()
            done(lambda: reply)

        future.add_done_callback(over)
        return future

    def end(self, handle: Future) -> Literal["told", "begun", "unbegun"]:
        """End its worker process where it runs; else take the task back."""
        if handle.done() or self._ended_there(handle.key):
            return "told"
        with suppress(Exception):
            handle.cancel()
        return "begun" if self._ended_there(handle.key) else "unbegun"

    def close(self, run_key: str) -> None:
        """Drop the marks of a run's bundles, and close the client."""
        try:
            self._client.run_on_scheduler(_forget, run_key)
        finally:
            self._disconnect()

    def _ended_there(self, token: str) -> bool:
        """Whether a bundle ran on some worker; it is ended there."""
        return any(self._client.run(cancel_here, token, on_error="ignore").values())


def run_once(work: Work) -> Reply | str:
    """On a worker of the cluster: run a bundle, unless it was begun before.

    Dask runs a task again when its worker is lost; whether items may run again is the flow's to say. In words, where
    the bundle was begun before.
    """
    from distributed import get_worker
    from distributed.utils import sync

    worker = get_worker()

    def begun_before() -> str:
        if sync(worker.loop, worker.scheduler.event_is_set, name=work.token):
            return "the Dask worker that ran it is gone"
        sync(worker.loop, worker.scheduler.event_set, name=work.token)
        return ""

    return run_here(work, begun_before)


def _forget(run_key: str, dask_scheduler: Any = None) -> None:
    """On the scheduler: drop the marks of a run's bundles."""
    marks = dask_scheduler.extensions["events"]._events
    for name in [name for name in marks if run_key in name]:
        del marks[name]

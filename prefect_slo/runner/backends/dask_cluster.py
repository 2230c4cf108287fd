"""A Dask cluster, as ``ClusterBackend`` uses it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

from prefect_slo.control.need import Need
from prefect_slo.resources import Size
from prefect_slo.runner.backends.cluster_client import Fetch
from prefect_slo.runner.backends.remote import (
    Reply,
    Work,
    cancel_here,
    leave,
    needed,
    placed,
    run_here,
)

if TYPE_CHECKING:
    from distributed import Client, Future, Worker

DIRECT_BYTES = 2**20
"""What is larger goes to a worker directly, past the scheduler."""

FETCH_S = 60.0
"""A transfer that takes longer is looked after: the worker that held its part may be gone."""

_GONE = "the Dask worker that kept it is gone"

_TURNS = "prefect-slo-turns"
"""Under which the scheduler keeps, among its metadata, which bundles have begun, and when."""


Made = tuple["Client", Callable[[], None], Callable[[int], None] | None]


class DaskCluster:
    """Bundles as tasks of a Dask scheduler.

    Args:
        make: Makes the client; says how to close it with what it has started, and how to have that hold so many workers
            at least (``None`` where it doesn't grow).
        resources: By quantity of a size (``vcpus``, ``memory_mb``, ``gpu``), the resource of the cluster's workers that
            it takes of. Without any, a bundle takes one thread of a worker.
        own: Whether ``make`` starts the cluster.
    """

    def __init__(self, make: Callable[[], Made], resources: Mapping[str, str], *, own: bool = False) -> None:
        self._make, self._resources, self.own = make, resources, own
        self._client: Any = None
        self._disconnect: Callable[[], None] = lambda: None
        self._at_least: Callable[[int], None] | None = None

    def connect(self) -> None:
        """Make the client."""
        self._client, self._disconnect, self._at_least = self._make()

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

    def vacant(self) -> str:
        """Whether no worker is connected to the scheduler."""
        info = self._client.scheduler_info(n_workers=-1)
        if info["workers"]:
            return ""
        if self.own:
            return f"The Dask cluster at {info['address']} is still starting workers: none has come yet"
        return (  # whether somebody else's cluster adapts, its scheduler isn't told
            f"The Dask cluster at {info['address']} has no workers. Where it adapts, its owner starts them for what is "
            f"queued, and the owner's log says what keeps it; else start one: dask worker {info['address']}"
        )

    def workers(self) -> frozenset[str]:
        """Addresses of the workers that are connected to the scheduler."""
        return frozenset(self._client.scheduler_info(n_workers=-1)["workers"])

    def expect(self, need: Need) -> None:
        """Have the cluster's adaptive scaling hold so many workers at least, where it is ours."""
        if self._at_least is None:
            return
        now = sum(ceil(n / self._fit(size)) for size, n in need.now)
        self._at_least(max([now, *(ceil(n / self._fit(size)) for size, n in need.next)]))

    def _fit(self, size: Size) -> int:
        """Bundles of a size that run on one worker at once, as far as that is known: at least one."""
        for worker in self._client.scheduler_info(n_workers=1)["workers"].values():
            needs = needed(size, self._resources)
            fits = [int(worker["resources"].get(name, 0) / value) for name, value in needs.items()]
            return max(min([int(worker["nthreads"]), *fits]), 1)
        return 1

    def start(self, work: Work, parts: Sequence[Future], done: Callable[[Fetch], None]) -> Future:
        """Submit a task that depends on its parts: the scheduler places it where they lie, if it can."""
        resources = needed(work.size, self._resources) or None
        large = sum(len(payload) for _, payload in work.bundle.items) > DIRECT_BYTES
        there = large and bool(self._client.scheduler_info(n_workers=-1)["workers"])
        sent = self._client.scatter(work, hash=False, direct=True) if there else work
        own = self._client.id
        future: Future = self._client.submit(
            run_once, sent, own, *parts, key=work.token, pure=False, retries=0, resources=resources
        )

        def over(_: Future) -> None:  # in a thread of the client's: a large reply keeps no other lease waiting
            try:
                reply: Reply | str = future.result()
                if isinstance(reply, Reply):
                    reply = placed(reply, lambda number: _future(_part(work.token, number), self._client))
            except BaseException as error:
                reply = f"{type(error).__name__}: {error}"
            future.release()
            done(lambda: reply)

        future.add_done_callback(over)
        return future

    def fetch(self, part: Future) -> bytes:
        """Gather it, unless no worker has it: Dask would wait for ever for one that has."""
        try:
            patience_s = FETCH_S
            while any(self._client.who_has([part]).values()):
                with suppress(TimeoutError):
                    found: bytes = part.result(timeout=patience_s)
                    return found
                patience_s *= 2  # what has come until then is lost: a large part takes longer
        except Exception:
            if not self.gone(part):
                raise
        raise LookupError(_GONE)

    def gone(self, part: Future) -> str:
        """What the scheduler has told of it."""
        return "" if part.status in ("pending", "finished") else _GONE

    def never_ran(self, handle: Future, error: Exception | None) -> bool:
        """Whether it has left no mark: Dask drops what waits for a part that is lost."""
        return not self.turns(handle.key)

    def turns(self, token: str) -> list[float]:
        """By its mark."""
        since = self._client.get_metadata([_TURNS, token], default=None)
        return [since] if since is not None else []

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


def run_once(work: Work, client: str = "", *parts: bytes) -> Reply | str:
    """On a worker of the cluster: run a bundle, unless it was begun before.

    Dask runs a task again when its worker is lost; whether items may run again is the flow's to say. In words, where
    the bundle was begun before.

    Args:
        work: The bundle.
        client: Whose the parts of outcomes are that stay here.
        parts: What its payloads refer to.
    """
    from distributed import get_worker
    from distributed.utils import sync

    worker = get_worker()

    def begun_before() -> str:
        mark = [_TURNS, work.token]
        if sync(worker.loop, worker.scheduler.get_metadata, keys=mark, default=None) is not None:
            return "the Dask worker that ran it is gone"
        sync(worker.loop, worker.scheduler.set_metadata, keys=mark, value=time.time())
        return ""

    reply = run_here(work, parts, begun_before)
    if isinstance(reply, str):
        return reply
    reply, left = leave(replace(reply, worker=worker.address), work.bundle.keep)
    if left:
        data = {_part(work.token, number): part for number, part in enumerate(left)}
        sync(worker.loop, _keep, worker, work.token, data, client)
    return reply


async def _keep(worker: Worker, token: str, data: dict[str, bytes], client: str) -> None:
    """Have a worker hold data as a client's own, as ``Client.scatter`` does in a task."""
    task = worker.state.tasks.get(token)
    if task is None or task.state != "executing":
        return  # nobody waits for the reply, and so nobody would let go of them
    worker.update_data(data=data)
    held = {key: [worker.address] for key in data}
    await worker.scheduler.update_data(who_has=held, nbytes={k: len(v) for k, v in data.items()}, client=client)


def _part(token: str, number: int) -> str:
    return f"{token}-part-{number}"


def _future(key: str, client: Client) -> Future:
    from distributed import Future

    return Future(key, client, state="memory")


def _forget(run_key: str, dask_scheduler: Any = None) -> None:
    """On the scheduler: drop the marks of a run's bundles."""
    marks = dask_scheduler.task_metadata.get(_TURNS, {})
    for name in [name for name in marks if run_key in name]:
        del marks[name]
    if not marks:
        dask_scheduler.task_metadata.pop(_TURNS, None)

"""Bundles on a cluster with a scheduler of its own: every bundle is one task of it, with the resources of its size.

A lease holds nothing until it has a bundle: the scheduler queues what finds no room, and a cluster that adapts grows by
what is queued. All calls of the cluster's client are made by one thread, in order; only what lies on the cluster is
fetched by whichever thread wants it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from queue import Empty, SimpleQueue
from typing import Any

from prefect_slo.control.need import Need
from prefect_slo.resources import Size
from prefect_slo.runner.backends.cluster_client import Cluster, Fetch
from prefect_slo.runner.backends.cluster_watch import PATIENCE_S, Watch
from prefect_slo.runner.backends.protocol import Bundle, Capabilities, Finished, Lost, Opened, Report, Sink
from prefect_slo.runner.backends.remote import Clocks, Work, each_part, told
from prefect_slo.runner.notices import Notice

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""How long bundles may take to end when the run is over."""

KEEP_BYTES = 2**20
"""Results of at least this size stay on the cluster, unless told otherwise: to fetch one later takes a round trip."""

_SHUT_DOWN = "the backend was shut down"


class ClusterBackend:
    """Runs bundles on a cluster; one backend per flow run.

    Args:
        cluster: The cluster.
        env: Environment of the worker processes that run bundles.
        run_key: Names the run.
        capped: Whether items are held to the memory of their size.
        keep: Parts of outcomes of at least so many bytes stay on the cluster; ``None`` for none.
        grows: Whether the cluster grows with what is expected of it.
        notice: Tells the user something.
        patience_s: How long bundles wait on a cluster without workers before the user hears of it.
    """

    def __init__(
        self,
        cluster: Cluster,
        env: Mapping[str, str],
        run_key: str,
        *,
        capped: bool = True,
        keep: int | None = KEEP_BYTES,
        grows: bool = False,
        notice: Notice = logger.warning,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._watch = Watch(cluster.vacant, cluster.workers, notice, patience_s=patience_s)
        self._capped, self._keep, self._grows = capped, keep, grows
        self._cluster, self._env = cluster, tuple(sorted(env.items()))
        self._run_key = f"{run_key}-{os.urandom(4).hex()}"
        self._leases: dict[int, _Lease] = {}
        self._clocks = Clocks()
        self._connected, self._started_at = False, float("-inf")
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._gate = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="prefect-slo-cluster", daemon=True)
        self._thread.start()

    def capabilities(self) -> Capabilities:
        """What a cluster can promise: its scheduler accounts for vCPUs, and pins nothing to cores."""
        return Capabilities(
            isolated=True,
            hard_timeouts=True,
            memory_limits=self._capped,
            vcpu_limits=False,
            vcpus=float("inf"),
            memory_mb=float("inf"),
            streams=False,
            queues=True,
            elsewhere=True,
            keeps=self._keep,
            grows=self._grows,
        )

    def expect(self, need: Need) -> None:
        """Have the cluster prepare for these workers; a cluster of this run's own is started for them."""
        self._calls.put(lambda: self._expect(need))

    def open(self, lease: int, size: Size, sink: Sink) -> None:
        """A place in the scheduler's queue; lost where no worker of the cluster could ever take its size."""
        asked = time.monotonic()
        with self._gate:
            if not self._closed:
                self._calls.put(lambda: self._open(_Lease(lease, size, sink), asked))
                return
        sink(Lost(lease, "start", _SHUT_DOWN))

    def submit(self, lease: int, bundle: Bundle) -> None:
        """Hand a bundle to the scheduler."""
        self._calls.put(lambda: self._submit(lease, bundle))

    def cancel(self, lease: int) -> None:
        """Take back what a lease runs: out of the queue, or by ending its worker process."""
        self._calls.put(lambda: self._cancel(lease, "cancelled"))

    def close(self, lease: int) -> None:
        """Give a lease back."""
        self._calls.put(lambda: self._close(lease))

    def shutdown(self) -> None:
        """Take back everything, and close what was started."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._calls.put(None)
        self._thread.join()

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (call := self._next_call()) is not None:
            self._carefully(call)
        for lease in list(self._leases):
            self._cancel(lease, _SHUT_DOWN)
        until = time.monotonic() + GRACE_S
        with suppress(Empty):
            while self._leases:
                following = self._calls.get(timeout=max(until - time.monotonic(), 0))
                if following is not None:
                    self._carefully(following)
        if self._connected:
            with suppress(Exception):
                self._cluster.close(self._run_key)

    def _next_call(self) -> Callable[[], None] | None:
        """What is asked next; a look at the cluster whenever one is due, however much is asked."""
        due_s = self._watch.due_s()
        if due_s > 0:
            with suppress(Empty):
                return self._calls.get(timeout=due_s)
        return lambda: self._watch.look(sum(lease.bundle is not None for lease in self._leases.values()))

    def _carefully(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            logger.exception("A request to a cluster failed.")

    def _open(self, lease: _Lease, asked: float) -> None:
        if self._closed:
            lease.sink(Lost(lease.id, "start", _SHUT_DOWN))
            return
        try:
            self._connect()
            lack = self._cluster.lack(lease.size)
        except Exception as error:
            lack = f"the cluster can't be used: {type(error).__name__}: {error}"
        if lack:
            lease.sink(Lost(lease.id, "start", lack))
            return
        self._leases[lease.id] = lease
        waited_s, start_s = time.monotonic() - asked, max(self._started_at - asked, 0.0)
        lease.sink(Opened(lease.id, cold=start_s > 0, start_s=start_s, wait_s=waited_s - start_s, pid=0))

    def _expect(self, need: Need) -> None:
        if self._closed:
            return
        try:
            self._connect()
        except Exception:
            return  # whoever opens a lease is told
        self._cluster.expect(need)

    def _connect(self) -> None:
        if not self._connected:
            self._cluster.connect()
            self._connected = True
            if self._cluster.own:
                self._started_at = time.monotonic()

    def _submit(self, id: int, bundle: Bundle) -> None:
        lease = self._leases.get(id)
        if lease is None:  # its loss was told without this bundle
            return
        known = replace(bundle, program_key=f"{self._run_key}/{bundle.program_key}", parts=())
        lease.token, lease.cancelled = f"prefect-slo-{self._run_key}-{bundle.id}", ""
        work = Work(lease.token, known, lease.size, self._env, self._capped)

        def done(fetch: Fetch) -> None:
            self._calls.put(lambda: self._ended(lease, bundle, fetch))

        try:
            parts = [part.handle for part in bundle.parts]
            lease.since, lease.there = time.monotonic(), self._watch.there()
            lease.bundle, lease.handle = bundle, self._cluster.start(work, parts, done)
        except Exception as error:
            self._lose(lease, Lost(id, "start", f"not taken by the cluster: {error}", None, _ids(bundle)))

    def _ended(self, lease: _Lease, bundle: Bundle, fetch: Fetch) -> None:
        """A bundle is over."""
        received = time.monotonic()
        if lease.bundle is not bundle:
            return  # it was cancelled, and that was told
        untouched, error = tuple[int, ...](), None
        try:
            reply = fetch()
        except Exception as raised:
            error, reply = raised, f"{type(raised).__name__}: {raised}"
        if isinstance(reply, str):
            with suppress(Exception):
                untouched = _ids(bundle) if self._cluster.never_ran(lease.handle, error) else ()
            inputs_gone = bool(untouched) and any(part.gone() for part in bundle.parts)
            lost = Lost(lease.id, "died", reply, None, untouched, inputs_gone=inputs_gone)
            self._lose(lease, lease.why(lost))
            return
        lease.bundle = lease.handle = None
        for report in told(reply, lease.id, self._clocks.seen(reply, received)):
            if isinstance(report, Lost):
                self._leases.pop(lease.id, None)
                report = lease.why(report)
            if isinstance(report, Finished):
                report = replace(report, on_new=lease.saw_come(reply.worker))
            lease.sink(self._with_parts(report))

    def _with_parts(self, report: Report) -> Report:
        """A report in which what was left on the cluster stands for itself."""
        return each_part(
            report,
            lambda part: part if isinstance(part, bytes) else KeptPart(self, self._cluster, part.handle, part.size),
        )

    def _cancel(self, id: int, detail: str) -> None:
        lease = self._leases.get(id)
        if lease is None:
            return
        if lease.bundle is None:
            self._lose(lease, Lost(id, "cancelled", detail))
            return
        lease.cancelled = detail
        try:
            how = self._cluster.end(lease.handle)
        except Exception as error:
            how, detail = "begun", f"{detail}; the cluster can't be asked: {error}"
        if how != "told":
            untouched = () if how == "begun" else _ids(lease.bundle)
            self._lose(lease, Lost(id, "cancelled", detail, None, untouched))

    def _close(self, id: int) -> None:
        self._leases.pop(id, None)

    def _lose(self, lease: _Lease, lost: Lost) -> None:
        self._leases.pop(lease.id, None)
        bundle, lease.bundle, lease.handle = lease.bundle, None, None
        if bundle is not None:
            now = time.monotonic()
            unrun = lost.untouched == _ids(bundle)
            lost = replace(lost, bundle=bundle.id, held=(now, now) if unrun else self._held(lease, now))
        lease.sink(lost)

    def _held(self, lease: _Lease, now: float) -> tuple[float, float] | None:
        """From when to when a bundle of which nothing more is heard had its room; ``None`` where that isn't known."""
        turns = None
        with suppress(Exception):
            turns = self._cluster.turns(lease.token)
        if turns is None:
            return None
        since = turns[0] - time.time() + time.monotonic() if turns else now
        return min(max(since, lease.since), now), now  # clocks of machines may differ


@dataclass(frozen=True, eq=False, slots=True)
class KeptPart:
    """A part of an outcome that lies on a cluster; the cluster lets go of it when nobody holds this any more.

    Attributes:
        place: The backend.
        cluster: Its cluster.
        handle: What the cluster's client knows it by.
        size: Its bytes.
    """

    place: ClusterBackend
    cluster: Cluster
    handle: Any
    size: int

    @property
    def fetch_usd(self) -> Decimal:
        """Nothing is charged for bringing it here."""
        return Decimal()

    def gone(self) -> str:
        """Why it can't be had any more, as far as that is known."""
        return self.cluster.gone(self.handle)

    def fetch(self) -> bytes:
        """Bring it here."""
        return self.cluster.fetch(self.handle)


@dataclass
class _Lease:
    """A lease, and what it runs.

    Attributes:
        token: Names what it runs on the cluster.
        since: When that was submitted.
        there: Workers that the cluster had then; ``None`` where it could not be asked.
        cancelled: In words, why what it runs was asked to end.
    """

    id: int
    size: Size
    sink: Sink
    bundle: Bundle | None = None
    handle: Any = None
    token: str = ""
    since: float = 0.0
    there: frozenset[str] | None = None
    cancelled: str = ""

    def why(self, lost: Lost) -> Lost:
        """A loss for the reason that it has: a cluster may end a bundle by having its processes die."""
        if not self.cancelled or lost.reason != "died":
            return lost
        return replace(lost, reason="cancelled", detail=self.cancelled)

    def saw_come(self, worker: str) -> bool:
        """Whether a worker has come since; one without a name may have been there."""
        return bool(worker) and self.there is not None and worker not in self.there


def _ids(bundle: Bundle) -> tuple[int, ...]:
    return tuple(item for item, _ in bundle.items)

"""AWS Lambda and Batch: a lease is a slot with a thread of its own here, each of its bundles an invocation there.

Prefect stays here (``Capabilities.hosted``): what is invoked is a generic worker function of the lease's memory size,
which gets the task's function and arguments. Lambda starts environments with the work and keeps them warm by itself, so
a lease opens at once; a cold start shows in the report of the bundle that met it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType

from prefect.logging import get_logger

from prefect_slo.aws.delegating import Delegating
from prefect_slo.aws.exchange import Exchange
from prefect_slo.aws.jobs import end_jobs
from prefect_slo.aws.kept import KEEP_BYTES, Place
from prefect_slo.resources import Size
from prefect_slo.runner.backends.aws_slot import Slot
from prefect_slo.runner.backends.protocol import Bundle, Capabilities, Lost, Opened, Sink


class LambdaBackend:
    """Runs bundles on worker functions; one backend per flow run.

    Args:
        exchange: Sends work there.
        name_of: The worker function of a memory size.
        concurrency: Invocations at once; later leases wait.
        of_size: Invocations at once of a memory size, where its function has less.
        memory_mb: The largest size.
        hardware: Kind of machine, as the pool's measurements are kept.
        run_key: Names the run in keys of what is stored.
        place: Where results stay that are too large for a reply; ``None``: they come here at once.
    """

    def __init__(
        self,
        exchange: Exchange | Delegating,
        name_of: Callable[[int], str],
        *,
        concurrency: int,
        memory_mb: int,
        run_key: str,
        hardware: str = "lambda",
        of_size: Mapping[int, int] = MappingProxyType({}),
        place: Place | None = None,
    ) -> None:
        self._exchange, self._name_of, self._run_key = exchange, name_of, run_key
        self._concurrency, self._memory_mb, self._of_size = concurrency, memory_mb, of_size
        self._hardware, self._place = hardware, place
        self._lock = threading.Lock()
        self._leases: dict[int, Slot] = {}
        self._idle: list[Slot] = []
        self._waiting: list[tuple[int, Size, Sink, float]] = []
        self._stored: set[tuple[str, ...]] = set()
        self._closed = False

    def capabilities(self) -> Capabilities:
        """What worker functions can promise."""
        return Capabilities(
            isolated=True,
            hard_timeouts=True,
            memory_limits=True,
            vcpu_limits=True,
            vcpus=float("inf"),
            memory_mb=float(self._memory_mb),
            hardware=(self._hardware,),
            hosted=True,
            streams=False,
            metered=True,
            keeps=KEEP_BYTES if self._place is not None else None,
            place=self._place,
        )

    def open(self, lease: int, size: Size, sink: Sink) -> None:
        """Ask for a slot; it is there at once, unless ``concurrency`` invocations are held already."""
        with self._lock:
            if self._closed:
                sink(Lost(lease, "start", "the Lambda backend is shut down"))
                return
            self._waiting.append((lease, size, sink, time.monotonic()))
        self._admit()

    def submit(self, lease: int, bundle: Bundle) -> None:
        """Hand a bundle to an opened, idle lease."""
        with self._lock:
            slot = self._leases.get(lease)
        if slot is not None:
            slot.inbox.put(bundle)

    def cancel(self, lease: int) -> None:
        """Want no more of what a lease runs. Lambda ends no invocation: it is billed to its end, unheard."""
        with self._lock:
            slot = self._leases.pop(lease, None)
            self._waiting = [asked for asked in self._waiting if asked[0] != lease]
        if slot is not None:
            slot.abandon()
        self._admit()

    def close(self, lease: int) -> None:
        """Give an idle lease back; its thread serves the next one."""
        with self._lock:
            slot = self._leases.pop(lease, None)
            if slot is not None:
                self._idle.append(slot)
            self._waiting = [asked for asked in self._waiting if asked[0] != lease]
        self._admit()

    def shutdown(self) -> None:
        """Let go of every lease; what is stored for this run is deleted."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            slots = [*self._idle, *self._leases.values()]
            self._idle, self._leases, self._waiting = [], {}, []
        for slot in slots:
            slot.end()
        end_jobs(self._run_key)
        self._forget()

    def _forget(self) -> None:
        """Delete what is stored. Where that can't be done the run is finished all the same: S3 deletes it later."""
        from botocore.exceptions import BotoCoreError, ClientError

        if (store := self._exchange.store) is None:
            return
        try:
            store.forget(self._stored.copy())
        except (ClientError, BotoCoreError) as error:
            get_logger("slo").warning(
                "What this run has stored in s3://%s/%s cannot be deleted (%s); a rule of the bucket deletes it.",
                store.bucket, store.prefix.strip("/"), error,
            )  # fmt: skip

    def _admit(self) -> None:
        while True:
            with self._lock:
                at = self._next() if not self._closed else None
                if at is None:
                    return
                lease, size, sink, asked = self._waiting.pop(at)
                slot = self._idle.pop() if self._idle else None
                slot = slot or Slot(self._exchange, self._run_key, self.close, self._stored, self._place)
                slot.serve(lease, self._name_of(size.memory_mb), size, sink)
                self._leases[lease] = slot
                wait_s = time.monotonic() - asked
            sink(Opened(lease, cold=False, start_s=0.0, wait_s=wait_s, pid=0))

    def _next(self) -> int | None:
        """Position of the first waiting lease that there is room for."""
        if len(self._leases) >= self._concurrency:
            return None
        held = Counter(slot.memory_mb for slot in self._leases.values())
        for at, (_, size, _, _) in enumerate(self._waiting):
            if held[size.memory_mb] < self._of_size.get(size.memory_mb, self._concurrency):
                return at
        return None

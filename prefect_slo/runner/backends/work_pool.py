"""Prefect work pools: a lease is a pilot, a job that runs bundles and stays warm for a while."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace

from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Bundle, Capabilities, Lost, Sink
from prefect_slo.runner.notices import Notice
from prefect_slo.runner.workpool.contact import Lease, Owner
from prefect_slo.runner.workpool.office import Office

SETTLE_S = 10.0
_owners = itertools.count(1)


class WorkPoolBackend:
    """Runs bundles in jobs of a work pool; one backend per flow run, on pilots that the process keeps.

    Args:
        office: Keeps the pilots.
        hardware: Kinds of machine that the pool has.
        memory_mb: The largest size.
        notice: Tells the user something.
        private: Whether the office ends with this backend.
    """

    def __init__(
        self, office: Office, *, hardware: tuple[str, ...], memory_mb: int, notice: Notice, private: bool = False
    ) -> None:
        self._office, self._hardware, self._memory_mb = office, hardware, memory_mb
        self._notice, self._private, self._owner = notice, private, next(_owners)
        self._lock = threading.Lock()
        self._leases: dict[int, Lease] = {}
        self._closed = False

    def capabilities(self) -> Capabilities:
        """What pilots can promise: what a worker process can, on another machine."""
        return Capabilities(
            isolated=True,
            hard_timeouts=True,
            memory_limits=True,
            vcpu_limits=True,
            vcpus=float("inf"),
            memory_mb=float(self._memory_mb),
            hardware=self._hardware,
            elsewhere=True,
        )

    def open(self, lease: int, size: Size, sink: Sink) -> None:
        """Ask for a pilot: a warm one of that size, or a new job."""
        self.open_for("", lease, size, sink)

    def open_for(self, stage: str, lease: int, size: Size, sink: Sink) -> None:
        """Ask for a pilot for a stage: it waits for none that the stage holds itself."""
        asked = Lease(lease, Owner(self._owner, stage), size, sink, self._notice, self._office.clock())
        with self._lock:
            closed = self._closed
            if not closed:
                self._leases[lease] = asked
        if closed:
            sink(Lost(lease, "start", "the backend of the work pool is shut down"))
        else:
            self._office.open(asked)

    def submit(self, lease: int, bundle: Bundle) -> None:
        """Hand a bundle to an opened, idle lease."""
        if (asked := self._leases.get(lease)) is not None:
            self._office.submit(asked, replace(bundle, program_key=f"{self._owner}/{bundle.program_key}"))

    def cancel(self, lease: int) -> None:
        """End what the lease runs; its pilot goes on with another worker."""
        if (asked := self._leases.get(lease)) is not None:
            self._office.cancel(asked)

    def close(self, lease: int) -> None:
        """Give an idle lease back; its pilot stays warm for the next of its size."""
        with self._lock:
            asked = self._leases.pop(lease, None)
        if asked is not None:
            self._office.close(asked)

    def shutdown(self) -> None:
        """End every lease and wait for that. Pilots stay warm for the next flow run of this process, for a while."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            leases, self._leases = list(self._leases.values()), {}
        for lease in leases:
            self._office.cancel(lease, "the backend was shut down")
        deadline = time.monotonic() + SETTLE_S
        while any(self._office.holds(lease) for lease in leases) and time.monotonic() < deadline:
            time.sleep(0.02)
        if self._private:
            self._office.shut()

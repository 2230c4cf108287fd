"""Reports on their way to whoever asked for leases: noted by any thread, delivered in order by one, without a lock."""

from __future__ import annotations

import logging
import threading
from collections import deque

from prefect_slo.runner.backends.protocol import Lost, Report, Sink
from prefect_slo.runner.local.member import Lease

logger = logging.getLogger(__name__)


class Post:
    """What was noted and not delivered yet."""

    def __init__(self) -> None:
        self._reports: deque[tuple[Sink, Report]] = deque()

    def __bool__(self) -> bool:
        return bool(self._reports)

    def put(self, lease: Lease, report: Report) -> None:
        """Note a report."""
        self._reports.append((lease.sink, report))

    def deliver(self) -> None:
        """Pass on what was noted. For one thread alone, which holds no lock: sinks may ask the pool for anything."""
        while self._reports:
            sink, report = self._reports.popleft()
            try:
                sink(report)
            except Exception:
                logger.exception("A sink raised on %s; the report is lost.", type(report).__name__)


def refuse(lease: Lease, detail: str) -> None:
    """Say that a lease is lost where there is no thread to deliver."""
    lease.done = True
    report = Lost(lease.id, "start", detail)
    threading.Thread(target=lease.sink, args=(report,), name="prefect-slo-io", daemon=True).start()

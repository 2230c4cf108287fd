"""A backend without workers: items take as long as they are told to, on a clock that is moved by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from prefect_slo.errors import InvalidValue
from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import (
    Bundle,
    Capabilities,
    Finished,
    ItemReport,
    Lost,
    Opened,
    Outcome,
    Progress,
    Report,
    RunItem,
    Sink,
)
from prefect_slo.testing.clock import FakeClock

Duration = Callable[[Bundle, int, Any], float]
"""Seconds that an item takes: ``(bundle, item id, payload)``."""


@dataclass
class _Lease:
    size: Size
    sink: Sink
    asked: float
    up: bool = False
    bundle: Bundle | None = None
    ended: int = 0
    begun: float = 0.0


class FakeBackend:
    """A ``Backend`` in virtual time, in one thread: reports come as the clock is moved.

    A bundle's program is opened and called for its items, where it has one; what that takes in real time doesn't count.

    Args:
        clock: The time.
        duration: Seconds that an item takes; by default its payload is the number.
        start_s: Seconds that a worker takes to start.
        vcpus: What all leases may hold together; later ones wait.
        memory_mb: Likewise.
    """

    def __init__(
        self,
        clock: FakeClock,
        *,
        duration: Duration | None = None,
        start_s: float = 0.0,
        vcpus: float = float("inf"),
        memory_mb: float = float("inf"),
    ) -> None:
        self.clock, self.start_s, self.vcpus, self.memory_mb = clock, start_s, vcpus, memory_mb
        self._duration = duration or _payload_is_seconds
        self._leases: dict[int, _Lease] = {}
        self._waiting: list[int] = []
        self._opened: dict[str, RunItem] = {}

    def capabilities(self) -> Capabilities:
        """Nothing travels; everything is enforced, as nothing runs."""
        return Capabilities(False, True, True, True, self.vcpus, self.memory_mb)

    def open(self, lease: int, size: Size, sink: Sink) -> None:
        """Ask for a worker; it comes after ``start_s``, once there is room."""
        self._leases[lease] = _Lease(size, sink, self.clock.now)
        self._waiting.append(lease)
        self._admit()

    def submit(self, lease: int, bundle: Bundle) -> None:
        """Hand a bundle to an opened, idle lease."""
        held = self._leases[lease]
        if not held.up or held.bundle is not None:
            raise InvalidValue("lease", lease, "one that is opened and idle")
        held.bundle, held.ended, held.begun = bundle, 0, self.clock.now
        self._next_item(lease, bundle)

    def cancel(self, lease: int) -> None:
        """End what the lease is running."""
        if lease in self._leases:
            self._lose(lease, "cancelled", "cancelled")

    def close(self, lease: int) -> None:
        """Give an idle lease back."""
        self._leases.pop(lease, None)
        self._admit()

    def shutdown(self) -> None:
        """Let go of every lease."""
        self._leases.clear()
        self._waiting.clear()

    def _admit(self) -> None:
        for lease in list(self._waiting):
            held = self._leases.get(lease)
            if held is None:
                self._waiting.remove(lease)
                continue
            used = [h.size for name, h in self._leases.items() if name not in self._waiting]
            if (
                sum(size.vcpus for size in used) + held.size.vcpus > self.vcpus
                or sum(size.memory_mb for size in used) + held.size.memory_mb > self.memory_mb
            ):
                return
            self._waiting.remove(lease)
            self.clock.call_later(self.start_s, partial(self._up, lease, held))

    def _up(self, lease: int, held: _Lease) -> None:
        if self._leases.get(lease) is held:
            held.up = True
            wait_s = self.clock.now - held.asked - self.start_s
            held.sink(Opened(lease, self.start_s > 0, self.start_s, wait_s, os.getpid()))

    def _next_item(self, lease: int, bundle: Bundle) -> None:
        held = self._leases[lease]
        if held.ended == len(bundle.items):
            held.bundle = None
            held.sink(Finished(lease, bundle.id, held.begun, self.clock.now))
            return
        item, payload = bundle.items[held.ended]
        seconds, limit = self._duration(bundle, item, payload), bundle.timeout_s
        if limit is not None and seconds > limit:
            self.clock.call_later(limit, partial(self._time_out, lease, bundle))
        else:
            self.clock.call_later(seconds, partial(self._item_ended, lease, bundle, self.clock.now))

    def _item_ended(self, lease: int, bundle: Bundle, started: float) -> None:
        held = self._leases.get(lease)
        if held is None or held.bundle is not bundle:
            return
        item, payload = bundle.items[held.ended]
        held.ended += 1
        outcome = self._run(lease, bundle, item, payload)
        held.sink(Progress(lease, bundle.id, (ItemReport(item, outcome, started, self.clock.now),)))
        self._next_item(lease, bundle)

    def _run(self, lease: int, bundle: Bundle, item: int, payload: Any) -> Outcome:
        if bundle.program is None:
            return Outcome(None)
        if bundle.program_key not in self._opened:
            self._opened[bundle.program_key] = bundle.program.open(lambda _: None)
        return self._opened[bundle.program_key](item, payload)

    def _time_out(self, lease: int, bundle: Bundle) -> None:
        held = self._leases.get(lease)
        if held is not None and held.bundle is bundle:
            self._lose(lease, "timeout", f"an item ran longer than {bundle.timeout_s:g} s")

    def _lose(self, lease: int, reason: Any, detail: str) -> None:
        held = self._leases.pop(lease)
        items = tuple(item for item, _ in held.bundle.items[held.ended :]) if held.bundle is not None else ()
        running, untouched = (items[0], items[1:]) if items else (None, ())
        bundle = held.bundle.id if held.bundle is not None else None
        report: Report = Lost(lease, reason, detail, running, untouched, bundle=bundle)
        held.sink(report)
        self._admit()


def _payload_is_seconds(bundle: Bundle, item: int, payload: Any) -> float:
    return float(payload)

"""The leases of one flow run: on which pool each is, and what it was sent last."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from prefect_slo.control import events as control
from prefect_slo.runner.backends.protocol import Backend, Bundle, Capabilities, LendingBackend, Lost, Sink
from prefect_slo.runner.measure import Measure


@dataclass(frozen=True, slots=True)
class Sent:
    """A bundle that is on its way, or was.

    Attributes:
        bundle: Its id.
        items: In order.
        batches: Items that run as one, by the first of them.
    """

    bundle: int
    items: tuple[int, ...]
    batches: Mapping[int, tuple[int, ...]]

    def together(self, first: int) -> tuple[int, ...]:
        """Items that run as one with this."""
        return self.batches.get(first, (first,))

    def whole(self, lost: Lost) -> Lost:
        """A loss that also speaks of the bundle that was on its way when the worker was already gone."""
        if self.bundle != lost.bundle:
            return replace(lost, running=None, untouched=self.items)
        return replace(lost, untouched=tuple(item for first in lost.untouched for item in self.together(first)))


class Leases:
    """Opens, feeds and closes leases on the pools of a flow run.

    Args:
        backends: By pool name.
        measure: Hears of each lease.
        sink: Where their reports go.
    """

    def __init__(self, backends: Mapping[str, Backend], measure: Measure, sink: Sink) -> None:
        self._backends, self._measure, self._sink = backends, measure, sink
        self._pool_of: dict[int, str] = {}
        self._sent: dict[int, Sent] = {}
        self._can: dict[str, Capabilities] = {}

    def backend(self, pool: str) -> Backend:
        """Of a pool."""
        return self._backends[pool]

    def capabilities(self, pool: str) -> Capabilities:
        """What a pool's backend can promise."""
        if pool not in self._can:
            self._can[pool] = self._backends[pool].capabilities()
        return self._can[pool]

    def place(self, pool: str, *, valueless: bool) -> object:
        """Where results have to be that a call takes there; ``None`` for in the flow's process.

        Args:
            pool: The pool.
            valueless: Whether Prefect's engine looks at no argument of the call.
        """
        can = self.capabilities(pool)
        if can.hosted and not (can.keeps is not None and valueless):
            return None
        return can.place if can.place is not None else self._backends[pool]

    def pool_of(self, lease: int) -> str | None:
        """The pool of a lease; ``None`` where it is over."""
        return self._pool_of.get(lease)

    def open(self, asked: control.OpenLease) -> None:
        """Ask for a worker."""
        self._pool_of[asked.lease] = asked.pool
        can, now = self.capabilities(asked.pool), time.monotonic()
        self._measure.leased(
            asked.lease, asked.stage, asked.pool, asked.size, now, metered=can.metered, queues=can.queues
        )
        backend = self._backends[asked.pool]
        if isinstance(backend, LendingBackend):
            backend.open_for(asked.stage, asked.lease, asked.size, self._sink)
        else:
            backend.open(asked.lease, asked.size, self._sink)

    def send(self, lease: int, bundle: Bundle, sent: Sent) -> None:
        """Hand a bundle to an idle lease."""
        self._sent[lease] = sent
        self._backends[self._pool_of[lease]].submit(lease, bundle)

    def together(self, lease: int, first: int) -> tuple[int, ...]:
        """Items of what a lease was sent last that run as one with the first of them."""
        sent = self._sent.get(lease)
        return sent.together(first) if sent is not None else (first,)

    def cancel(self, lease: int) -> None:
        """End what a lease runs."""
        self._backends[self._pool_of[lease]].cancel(lease)

    def close(self, lease: int) -> None:
        """Give an idle lease back."""
        self._sent.pop(lease, None)
        self._measure.released(lease, time.monotonic())
        self._backends[self._pool_of.pop(lease)].close(lease)

    def lost(self, report: Lost) -> Lost:
        """A loss that also speaks of what its lease was sent when its worker was already gone."""
        sent = self._sent.pop(report.lease, None)
        return sent.whole(report) if sent is not None else report

    def never_started_away(self, report: Lost) -> bool:
        """Whether a worker did not start that is not this machine's, so that a user has to hear why."""
        pool = self._pool_of.get(report.lease)
        if report.reason != "start" or pool is None:
            return False
        can = self.capabilities(pool)
        return can.hosted or can.elsewhere

    def end(self) -> None:
        """End whatever runs, as far as it can be."""
        for lease in self._pool_of:
            with contextlib.suppress(Exception):
                self.cancel(lease)

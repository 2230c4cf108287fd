"""What the scheduler knows of a stage and of a lease, and how many leases a stage wants."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from prefect_slo.control.events import Kind, StageRule
from prefect_slo.granularity import bundle_size

RAMP_S = 0.005
RAMP_START = 16
"""A stage without a worker limit opens 16 leases at once and twice as many every 5 ms while its items block."""

BLOCKING_S = 0.02
"""Items at least this long are taken to block (on I/O) where more leases would help."""


@dataclass(slots=True)
class Lease:
    """A worker that was asked for.

    Attributes:
        stage: Stage that it serves.
        rule: The stage's rule when it was opened.
        up: Whether it has its worker.
        pending: Items sent to it that have not ended, in order.
        done: How many items of its bundle have ended.
        idle_since: When it last ran out of work.
    """

    stage: str
    rule: StageRule
    up: bool = False
    pending: dict[int, None] = field(default_factory=dict)
    done: int = 0
    idle_since: float = 0.0

    def take(self, items: Iterable[int]) -> list[int]:
        """Those of ``items`` that it was still to run; from now on it isn't."""
        taken = [item for item in items if item in self.pending]
        for item in taken:
            del self.pending[item]
        return taken


@dataclass(slots=True)
class Stage:
    """A stage under way.

    Attributes:
        name: Its name.
        rule: How it is treated now.
        queue: Items that are ready, in the order to run them.
        kinds: Of items that are not of the rule's own kind, while they are under way.
        leases: Every lease that it has, by id: opening, idle or busy.
        idle: Ids of idle ones, the one that has idled longest first.
        opening: How many have no worker yet.
        item_s: Running mean of the time of an item.
        failures: Workers lost in a row before they ran anything.
    """

    name: str
    rule: StageRule
    queue: deque[int] = field(default_factory=deque)
    kinds: dict[int, Kind] = field(default_factory=dict)
    leases: dict[int, Lease] = field(default_factory=dict)
    idle: dict[int, None] = field(default_factory=dict)
    opening: int = 0
    item_s: float | None = None
    failures: int = 0
    _ramp: int = RAMP_START
    _ramped_at: float = 0.0

    def serves(self, lease: Lease) -> bool:
        """Whether a lease that was opened under an earlier rule is still good for the stage."""
        return lease.rule.pool == self.rule.pool and lease.rule.size == self.rule.size

    def spare(self) -> bool:
        """Whether it has more leases than its rule allows."""
        return self.rule.workers is not None and len(self.leases) > self.rule.workers

    def next_bundle(self) -> tuple[int, ...]:
        """Take the next items off the queue, which isn't empty: neighbours of one kind."""
        workers = max(len(self.leases), self.rule.workers or 1)
        queue, kinds = self.queue, self.kinds
        kind = kinds.get(queue[0])
        n = bundle_size(len(queue), workers, self.item_s, self.rule.bundle, (kind or self.rule).batch)
        if not kinds:
            return tuple(queue.popleft() for _ in range(n))
        bundle = [queue.popleft()]
        while len(bundle) < n and kinds.get(queue[0]) == kind:
            bundle.append(queue.popleft())
        return tuple(bundle)

    def treatment(self, item: int) -> StageRule | Kind:
        """What says how an item is batched and retried."""
        return self.kinds.get(item) or self.rule

    def put_back(self, items: list[int]) -> None:
        """Items that did not run come first."""
        self.queue.extendleft(reversed(items))

    def wanted(self, now: float) -> tuple[int, float | None]:
        """Leases that the stage should have, and when that may change by itself."""
        busy = len(self.leases) - self.opening
        if self.rule.workers is not None:
            bundles = -(-len(self.queue) // max(self.rule.bundle or 1, self.rule.batch))
            return min(self.rule.workers, busy + bundles), None
        if not self.leases:
            self._ramp, self._ramped_at = RAMP_START, now
        elif len(self.leases) >= self._ramp and not self.opening and now >= self._ramped_at + RAMP_S:
            if self.item_s is None or self.item_s >= BLOCKING_S:
                self._ramp = 2 * self._ramp
            self._ramped_at = now
        wanted = min(self._ramp, busy + len(self.queue))
        return wanted, max(self._ramped_at, now) + RAMP_S if wanted < busy + len(self.queue) else None

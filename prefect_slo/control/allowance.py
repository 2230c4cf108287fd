"""What the leases of one run may hold, on their pools and of their tasks, and which idle ones are in another's way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prefect_slo.control.events import StageRule
from prefect_slo.control.room import Room
from prefect_slo.control.together import Together
from prefect_slo.resources import Capacity


class Allowance:
    """Counts leases by the rules that they were opened under.

    Args:
        capacity: By pool, what leases may hold together; a missing pool means no limit.
    """

    def __init__(self, capacity: Mapping[str, Capacity]) -> None:
        self._room, self._together = Room(capacity), Together()

    def take(self, rule: StageRule) -> None:
        """A lease was opened."""
        self._room.take(rule.pool, rule.size)
        self._together.take(rule)

    def free(self, rule: StageRule) -> None:
        """A lease is over."""
        self._room.free(rule.pool, rule.size)
        self._together.free(rule)

    def pool_is_full(self, rule: StageRule) -> bool:
        """Whether it is for its pool alone that a lease does not fit."""
        return self._together.fits(rule) and not self._has_room(rule)

    def in_the_way(self, rule: StageRule, idle: Iterable[tuple[int, StageRule]]) -> list[int] | None:
        """Ids of the leases to give back so that one more fits; ``None`` where it would not even so.

        Args:
            rule: What the lease is to be opened under.
            idle: Leases that may be given back for it, by id and rule, the best to give back first.
        """
        given: list[tuple[int, StageRule]] = []
        for lease, held in idle:
            if self._fits(rule):
                break
            if (held.pool == rule.pool and not self._has_room(rule)) or (
                held.task == rule.task and not self._together.fits(rule)
            ):
                given.append((lease, held))
                self.free(held)
        fits = self._fits(rule)
        for _, held in given:
            self.take(held)
        return [lease for lease, _ in given] if fits else None

    def _fits(self, rule: StageRule) -> bool:
        return self._has_room(rule) and self._together.fits(rule)

    def _has_room(self, rule: StageRule) -> bool:
        return self._room.fits(rule.pool, rule.size)

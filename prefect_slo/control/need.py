"""How many workers a run's stages are about to need: what a pool that grows is told ahead of its queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prefect_slo.control.events import StageRule
from prefect_slo.resources import Size

Leases = tuple[tuple[Size, int], ...]
"""Workers at once, by size."""


@dataclass(frozen=True)
class Need:
    """Workers that stages need of a pool.

    Attributes:
        now: Of stages that have work to do.
        next: Of stages whose work waits for that of others; they need not run side by side.
    """

    now: Leases = ()
    next: Leases = ()


class Needs:
    """Keeps count of the items under way of some stages."""

    def __init__(self) -> None:
        self._stage_of: dict[int, str] = {}
        self._waiting: set[int] = set()
        self._now, self._next = Counter[str](), Counter[str]()

    def submitted(self, stage: str, items: Sequence[int], *, ready: bool) -> None:
        """Items have been submitted, ready or waiting for others."""
        self._stage_of.update(dict.fromkeys(items, stage))
        (self._now if ready else self._next)[stage] += len(items)
        if not ready:
            self._waiting.update(items)

    def ready(self, items: Iterable[int]) -> None:
        """Items wait no longer."""
        for item in self._waiting.intersection(items):
            stage = self._stage_of[item]
            self._next[stage] -= 1
            self._now[stage] += 1
            self._waiting.discard(item)

    def settled(self, items: Iterable[int]) -> None:
        """Items are over."""
        for item in items:
            if (stage := self._stage_of.pop(item, None)) is not None:
                (self._next if item in self._waiting else self._now)[stage] -= 1
                self._waiting.discard(item)

    def of(self, pool: str, rules: Mapping[str, StageRule]) -> Need:
        """What is needed of a pool by the rules in force, as far as those say how many workers a stage has."""
        return Need(*(tuple(_leases(items, pool, rules)) for items in (self._now, self._next)))


def _leases(items: Mapping[str, int], pool: str, rules: Mapping[str, StageRule]) -> Iterator[tuple[Size, int]]:
    for stage, count in items.items():
        rule = rules[stage]
        if count and rule.pool == pool and rule.workers is not None:
            yield rule.size, min(rule.workers, count)

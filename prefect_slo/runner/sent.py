"""What each lease of a flow run was sent last: what a report of it means for its items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from prefect_slo.runner.backends.protocol import Lost


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

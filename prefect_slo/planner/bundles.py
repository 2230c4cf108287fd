"""What is recorded of each item and how many items travel together, from predicted item time and fan-out."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from prefect_slo.plan import Record, StagePlan
from prefect_slo.units import finite, whole

FULL_ITEM_S = 0.05
"""A task run per item costs a few milliseconds of engine and database time; above this it is under a tenth of it."""

FULL_ITEMS = 200
"""Up to here a person may open single task runs, and their cost is a second at most: never trade them away."""

BARE_ITEMS = 20_000
"""Beyond this even one event per item (about 0.1 ms and 0.5 kB) is seconds of writing and megabytes to keep."""

BUNDLE_S = 0.025
"""A dispatch costs up to half a millisecond: in bundles of 25 ms that is at most 2 %."""


def record_level(item_s: float, items: int) -> Record:
    """``full`` unless items are short and many, then ``summary``; ``bare`` when they are very many."""
    if item_s >= FULL_ITEM_S or items <= FULL_ITEMS:
        return "full"
    return "bare" if items > BARE_ITEMS else "summary"


def bundle_size(item_s: float, items: int, workers: int) -> int:
    """Items per dispatch: at least ``BUNDLE_S`` of work, and at least two bundles per worker to balance the load."""
    wanted = ceil(BUNDLE_S / item_s) if item_s > 0 else items
    return max(1, min(wanted, items // (2 * workers)))


def bundled(stage: StagePlan, item_s: float, items: int) -> StagePlan:
    """A stage plan with its record level and bundle size chosen.

    Args:
        stage: The plan of the stage.
        item_s: Predicted seconds of one item (of one call, where items are batched).
        items: Predicted fan-out, in calls.

    Raises:
        InvalidValue: A negative time or fan-out.
    """
    items = whole(items, "items", least=0)
    item_s = max(0.0, finite(item_s, "item_s"))
    return replace(
        stage, record=record_level(item_s, items), bundle=bundle_size(item_s, items, stage.workers) if items else None
    )

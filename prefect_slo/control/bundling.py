"""How many items to send to a worker at once.

A dispatch costs a fraction of a millisecond and a hop between threads, so tiny items travel together; but items in one
bundle run one after another, so a bundle must stay short beside the work that is left. With ``q`` ready items, ``w``
workers and a measured item time ``t``:

    bundle = max(1, min(⌈TARGET / t⌉, ⌈q / (2·w)⌉, LARGEST))

which is guided self-scheduling (Polychronopoulos & Kuck, 1987) with a floor on the time of a dispatch. Nothing is
bundled before an item has been measured: two items of unknown length may both be long.
"""

from __future__ import annotations

from math import ceil

TARGET_S = 0.04
"""Time that a bundle should take: 100 times a dispatch, well below what a person notices."""

LARGEST = 512
"""Items in one bundle at most: bounds what a lost worker takes with it."""

SMOOTHING = 0.3
"""Weight of the newest bundle in the running mean of item times."""


def bundle_size(queued: int, workers: int, item_s: float | None, fixed: int | None, batch: int = 1) -> int:
    """Items for the next dispatch, between 1 and ``queued``.

    Args:
        queued: Items ready now, at least 1.
        workers: Leases that the stage has or may open.
        item_s: Running mean of the time of an item; ``None`` before the first is measured.
        fixed: What the plan says; ``None`` leaves it to the measured times.
        batch: Items that run as one: never divided between bundles, unless there are fewer.
    """
    if fixed is not None:
        wanted = fixed
    elif item_s is None:
        wanted = 1
    else:
        by_time = ceil(TARGET_S / max(item_s, 1e-6))
        wanted = max(1, min(by_time, ceil(queued / (2 * max(workers, 1))), LARGEST))
    return min(-(-wanted // batch) * batch, queued)


def smoothed(item_s: float | None, busy_s: float, items: int) -> float:
    """The running mean of item times after a bundle of ``items`` that took ``busy_s``."""
    latest = busy_s / max(items, 1)
    return latest if item_s is None else (1 - SMOOTHING) * item_s + SMOOTHING * latest

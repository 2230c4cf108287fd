"""The running mean of a stage's item times, from which its bundles grow."""

from __future__ import annotations

SMOOTHING = 0.3
"""Weight of the newest bundle in the running mean of item times."""


def smoothed(item_s: float | None, busy_s: float, items: int) -> float:
    """The running mean of item times after a bundle of ``items`` that took ``busy_s``."""
    latest = busy_s / max(items, 1)
    return latest if item_s is None else (1 - SMOOTHING) * item_s + SMOOTHING * latest

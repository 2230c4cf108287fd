"""How much of an item is written down: a task run each (``full``), one event each (``summary``), or nothing.

A task run costs the client 2-3 ms and the server 4-17 ms, so thousands of tiny items spend their time being recorded.
"""

from __future__ import annotations

from prefect_slo.plan import Record

TINY_S = 0.05
"""Below this an item costs about as much to record in full as to run."""

MANY = 200
"""Fewer items than this are recorded in full whatever they take: it is a matter of a second."""

TOO_MANY = 20_000
"""More items than this are not recorded one by one: the server would digest them for minutes."""


def record_level(items: int, item_s: float | None, *, eligible: bool) -> Record:
    """The level for a stage of ``items`` items that take ``item_s`` seconds each (``None``: not known yet).

    Args:
        items: Fan-out, predicted or submitted so far.
        item_s: Mean time of an item.
        eligible: Whether the task asks for nothing that the lower levels leave out.
    """
    if not eligible or item_s is None or item_s >= TINY_S or items < MANY:
        return "full"
    return "bare" if items > TOO_MANY else "summary"

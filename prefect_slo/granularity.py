"""How many items travel together, and how much is written down of each.

A dispatch costs a fraction of a millisecond and a hop between threads, so tiny items travel together; but items in one
bundle run one after another, so a bundle must stay short beside the work that is left. With ``q`` items, ``w`` workers
and an item time ``t``:

    bundle = max(1, min(⌈TARGET / t⌉, ⌈q / (2·w)⌉, LARGEST))

which is guided self-scheduling (Polychronopoulos & Kuck, 1987) with a floor on the time of a dispatch. Nothing is
bundled before an item time is known: two items of unknown length may both be long.

A task run costs the client 2-3 ms and the server 4-17 ms, so thousands of tiny items would spend their time being
recorded: below ``TINY_S`` and above ``MANY`` they get one event each (``summary``), above ``TOO_MANY`` none (``bare``).

The planner applies both to what it predicts, the runner to what it measures where no plan says.
"""

from __future__ import annotations

from math import ceil

from prefect_slo.plan import Record

TARGET_S = 0.04
"""Time that a bundle should take: 100 times a dispatch, well below what a person notices."""

LARGEST = 512
"""Items in one bundle at most: bounds what a lost worker takes with it."""

TINY_S = 0.05
"""Below this an item costs about as much to record in full as to run."""

MANY = 200
"""Fewer items than this are recorded in full whatever they take: it is a matter of a second."""

TOO_MANY = 20_000
"""More items than this are not recorded one by one: the server would digest them for minutes."""


def bundle_size(queued: int, workers: int, item_s: float | None, fixed: int | None = None, batch: int = 1) -> int:
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


def invocations(calls: int, batch: int, record: Record, bundle: int | None) -> int:
    """Invocations that a service which bills each of them sees, where Prefect stays with the flow.

    At level ``full`` its engine makes every call by itself, and a batch is one call; else a bundle goes out as one.
    """
    if record == "full" or batch > 1 or not bundle:
        return calls
    return ceil(calls / bundle)


def record_level(items: int, item_s: float | None, *, eligible: bool = True) -> Record:
    """The level for a stage of ``items`` items that take ``item_s`` seconds each (``None``: not known yet).

    Args:
        items: Fan-out, predicted or submitted so far.
        item_s: Mean time of an item.
        eligible: Whether the task asks for nothing that the lower levels leave out.
    """
    if not eligible or item_s is None or item_s >= TINY_S or items < MANY:
        return "full"
    return "bare" if items > TOO_MANY else "summary"

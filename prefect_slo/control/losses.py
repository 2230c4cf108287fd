"""What becomes of an item whose worker was lost while it ran.

Whether the item's side effects happened is unknown, so it runs again only as often as its rule allows
(``loss_retries``: the task's own retries, more where it is declared idempotent, none where declared not).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from prefect_slo.control.events import Kind, LossReason, StageRule

START_ATTEMPTS = 3
"""Workers that may fail to start, in a row, before a stage is given up."""

Verdict = Literal["again", "settle"]


def verdict(rule: StageRule | Kind, reason: LossReason, attempts: int, *, larger: bool) -> Verdict:
    """Whether an item that has been started ``attempts`` times runs again.

    Args:
        rule: The item's.
        reason: Why its worker was lost.
        attempts: How often it has been started.
        larger: Whether there is a larger size to move to.

    An item that ran out of memory runs again only where there is a larger size to move to: on the same size it would
    end the same way.
    """
    if reason == "cancelled":
        return "settle"
    if reason == "memory" and not larger:
        return "settle"
    return "again" if attempts <= rule.loss_retries else "settle"


def grown(rule: StageRule) -> StageRule:
    """The rule one step up its ladder of sizes."""
    size, *larger = rule.ladder
    return replace(rule, size=size, ladder=tuple(larger))


def fallen_back(rule: StageRule) -> StageRule:
    """The rule on its fallback pool, where the number of workers still holds but memory and isolation do not."""
    assert rule.fallback is not None
    return replace(rule, pool=rule.fallback, fallback=None, ladder=())

"""The flow run that is under way: which one it is, and how its user is told something, in its log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from uuid import UUID

from prefect.context import FlowRunContext
from prefect.logging import get_logger, get_run_logger

Notice = Callable[[str], None]


def flow_run() -> UUID | None:
    """The flow run that this is a part of, where it is a part of one."""
    context = FlowRunContext.get()
    return context.flow_run.id if context is not None and context.flow_run is not None else None


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """Logger of the run that this is a part of; the package's own where it is a part of none."""
    with suppress(Exception):
        return get_run_logger()
    return get_logger("slo")


def warner() -> Notice:
    """Warns in the log of the run that is under way, from any thread and later, too."""
    return run_logger().warning


def once(notice: Notice) -> Notice:
    """Tells the same once, however often it is said."""
    said = set[str]()

    def tell(words: str) -> None:
        if words not in said:
            said.add(words)
            notice(words)

    return tell

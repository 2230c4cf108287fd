"""Tells the user something, in the log of the flow run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from prefect.context import FlowRunContext
from prefect.logging import get_logger, get_run_logger

Notice = Callable[[str], None]


def warner() -> Notice:
    """Warns in the log of the flow run that is under way, from any thread and later, too."""
    if (context := FlowRunContext.get()) is not None:
        with suppress(Exception):
            return get_run_logger(context).warning
    return get_logger("slo").warning


def once(notice: Notice) -> Notice:
    """Tells the same once, however often it is said."""
    said = set[str]()

    def tell(words: str) -> None:
        if words not in said:
            said.add(words)
            notice(words)

    return tell

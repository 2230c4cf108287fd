"""What the loop says to the user: in the log of the flow run, once per process."""

from __future__ import annotations

import logging
import threading

from prefect_slo.runner.notices import run_logger

_said: set[tuple[str, str]] = set()
_lock = threading.Lock()


def say_once(flow_name: str, message: str, *, level: int = logging.INFO, about: str = "") -> None:
    """Log a message about a flow, unless this process has said it before.

    Args:
        flow_name: Name of the flow.
        message: What to say.
        level: ``INFO`` for news, ``WARNING`` for what went wrong.
        about: What the message is about, where its words vary: then only the first of them is said.
    """
    name = (flow_name, about or message)
    with _lock:
        if name in _said:
            return
        _said.add(name)
    run_logger().log(level, "%s: %s", flow_name, message)

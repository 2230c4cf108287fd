"""Maintenance of all flows: one that can't be worked on is told, and keeps nobody else waiting."""

from __future__ import annotations

import logging
from collections.abc import Callable

from prefect_slo.errors import SloError
from prefect_slo.telemetry.store import observed_flows

logger = logging.getLogger(__name__)


def for_each(flow_name: str | None, work: Callable[[str], str]) -> dict[str, str]:
    """What became of a flow, by its name; of every flow that has telemetry where none is named.

    Args:
        flow_name: Name of a flow, or ``None``.
        work: What is done, and in words what came of it.

    Raises:
        Exception: Whatever keeps the one flow that was named from being worked on. Of many, it is logged and stands in
            the place of what came of it.
    """
    if flow_name is not None:
        return {flow_name: work(flow_name)}
    told = {}
    for name in observed_flows():
        try:
            told[name] = work(name)
        except Exception as error:
            logger.warning("%s was left out.", name, exc_info=not isinstance(error, SloError))
            told[name] = f"left out: {error}"
    return told

"""What worker functions send back, as a lease tells of it: of what was sent, by this machine's clock, unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from prefect_slo.aws.exchange import Item, Returned
from prefect_slo.aws.invoke import Failed
from prefect_slo.aws.kept import KeptObject
from prefect_slo.aws.refusals import PACKAGES
from prefect_slo.runner.backends.protocol import Carried
from prefect_slo.runner.exceptions import portable


def check(returned: Returned, sent: Sequence[int]) -> None:
    """Refuse what answers other work.

    Raises:
        Failed: It is of items that were not sent, or not of all that were.
    """
    ended = [one.item for one in returned.items]
    if ended == list(sent) if returned.overran is None else ended == list(sent[: len(ended)]):
        return
    failed = Failed("died", f"items {list(sent)} were sent, its reply is of {ended}", billed=returned.answer.billed)
    failed.storage_usd, failed.lost = returned.storage_usd, returned.answer.lost
    raise failed


def timed(returned: Returned) -> list[tuple[Item, float, float]]:
    """Items with the instants of their start and end on this machine's clock.

    The worker's clock is another: it is laid so that the way there took as long as the way back, after any cold start.
    """
    answer, took = returned.answer, float(returned.telemetry.get("handler_s", 0.0))
    init_s = answer.report.init_ms / 1000 if answer.report is not None else 0.0
    ways_s = max(answer.received - answer.sent - took - init_s, 0.0)
    begun = answer.received - took - ways_s / 2
    return [
        (one, min(begun + one.started, answer.received), min(begun + one.ended, answer.received))
        for one in returned.items
    ]


def carried(one: Item, started: float, ended: float, kept: KeptObject | None = None) -> Carried:
    """How a function ended for one item, with its value; or with ``kept``, where that has stayed on S3."""
    value: Any = None
    unpicklable = one.unpicklable
    if not unpicklable and kept is None:
        try:
            value = pickle.loads(one.payload)
        except Exception as error:
            unpicklable = f"{type(error).__name__}: {error}"
        else:
            if one.failed:
                value, words = value
                portable(value)  # the worker lacks what would teach pickle here, as it arrives, how it goes on
                value.add_note(f"On the worker:\n{words}")
                if isinstance(value, ModuleNotFoundError):
                    value.add_note(PACKAGES)
    return Carried(value, one.failed, unpicklable, one.read_s, one.write_s, started, ended, kept)

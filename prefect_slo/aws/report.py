"""The REPORT line that Lambda writes at the end of every invocation: what it took, and what is billed."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from decimal import Decimal

from prefect_slo.pricing import PriceList

_LINE = re.compile(
    r"REPORT RequestId: (?P<request>\S+)\s+Duration: (?P<duration>[\d.]+) ms\s+Billed Duration: (?P<billed>\d+) ms\s+"
    r"Memory Size: (?P<size>\d+) MB\s+Max Memory Used: (?P<used>\d+) MB(?:\s+Init Duration: (?P<init>[\d.]+) ms)?"
)


@dataclass(frozen=True)
class Report:
    """One invocation as Lambda reports it.

    Attributes:
        request: Its request id.
        duration_ms: Time of the handler.
        billed_ms: Whole milliseconds that are billed, start of a new environment included.
        memory_mb: Memory of the function.
        used_mb: Most memory that its environment has used so far.
        init_ms: Time of the start of a new environment; 0 where there was none.
    """

    request: str
    duration_ms: float
    billed_ms: int
    memory_mb: int
    used_mb: int
    init_ms: float = 0.0

    @classmethod
    def of(cls, log: str) -> Report | None:
        """The last report in a piece of log; ``None`` where there is none."""
        found = list(_LINE.finditer(log))
        if not found:
            return None
        part = found[-1].groupdict()
        return cls(
            part["request"],
            float(part["duration"]),
            int(part["billed"]),
            int(part["size"]),
            int(part["used"]),
            float(part["init"] or 0.0),
        )


def tail(encoded: str) -> str:
    """The log tail of a reply, from the header that brings it."""
    return base64.b64decode(encoded).decode("utf-8", "replace") if encoded else ""


def bill(prices: PriceList, memory_mb: int, billed_ms: int, requests: int = 1) -> Decimal:
    """US dollars of invocations, exactly: ``billed_ms / 1000 · memory_mb / 1024 · price + requests · price``.

    Unit prices are taken as the decimal numbers that they are written as, and nothing is rounded.
    """
    gb_second, request = (Decimal(repr(price)) for price in (prices.gb_second, prices.request))
    return Decimal(billed_ms * memory_mb) / Decimal(1000 * 1024) * gb_second + requests * request

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
class Billed:
    """What invocations and jobs are billed, together.

    Attributes:
        usd: US dollars.
        ms: Whole milliseconds: of handlers and starts, and of jobs.
        requests: How many invocations and jobs there were.
    """

    usd: Decimal = Decimal()
    ms: int = 0
    requests: int = 0

    def __add__(self, other: Billed) -> Billed:
        return Billed(self.usd + other.usd, self.ms + other.ms, self.requests + other.requests)


NOTHING = Billed()


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


def bill(
    prices: PriceList,
    memory_mb: int,
    billed_ms: int,
    requests: int = 1,
    *,
    storage_mb: int = 0,
    used_gb_s: Decimal = Decimal(),
) -> Decimal:
    """US dollars of invocations, exactly: ``billed_ms / 1000 · memory_mb / 1024 · price + requests · price``.

    Unit prices are taken as the decimal numbers that they are written as, and nothing is rounded.

    Args:
        prices: The price list.
        memory_mb: Memory of the function.
        billed_ms: Whole milliseconds that are billed.
        requests: Invocations.
        storage_mb: Temporary disk of the function; what the price list includes costs nothing.
        used_gb_s: GB-seconds that the account has used this month before: what passes a tier has the price of the next.
    """
    seconds, request = Decimal(billed_ms) / 1000, Decimal(repr(prices.request))
    total = requests * request
    left = gb_s = Decimal(billed_ms * memory_mb) / Decimal(1000 * 1024)
    bounds = [(Decimal(), prices.gb_second), *((Decimal(repr(start)), price) for start, price in prices.tiers)]
    for (start, price), (end, _) in zip(bounds, [*bounds[1:], (used_gb_s + gb_s + 1, 0.0)], strict=True):
        part = min(max(end - max(start, used_gb_s), Decimal()), left)
        total, left = total + part * Decimal(repr(price)), left - part
    extra_mb = max(Decimal(storage_mb) - Decimal(repr(prices.storage_included_mb)), Decimal())
    return total + seconds * extra_mb / 1024 * Decimal(repr(prices.storage_gb_second))

"""What the data plane costs: S3 charges every request; within a region the bytes themselves cost nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from prefect_slo.aws.invoke import Answer
from prefect_slo.aws.s3 import PART_BYTES
from prefect_slo.charges import charge


@dataclass(frozen=True)
class Requests:
    """Requests to S3.

    Attributes:
        puts: Writes, and each part of one; beginning and completing one in parts are such requests, too.
        gets: Reads, and each range of one.
    """

    puts: int = 0
    gets: int = 0

    def __add__(self, other: Requests) -> Requests:
        return Requests(self.puts + other.puts, self.gets + other.gets)

    @property
    def usd(self) -> Decimal:
        """What they cost, exactly. Deleting is free."""
        if not (self.puts or self.gets):
            return Decimal()
        put, get = (Decimal(repr(charge(name).value)) for name in ("s3.put", "s3.get"))
        return self.puts * put + self.gets * get


def writing(size: int) -> Requests:
    """Requests that write an object of so many bytes, as ``S3Prefix.put`` does."""
    parts = -(-size // PART_BYTES)
    return Requests(puts=1 if parts <= 1 else parts + 2)


def reading(size: int | None) -> Requests:
    """Requests that read an object of so many bytes, as ``S3Prefix.get`` does."""
    return Requests(gets=max(-(-(size or 0) // PART_BYTES), 1))


def of_answer(answer: Answer) -> Requests:
    """Requests that the worker says it has made, and those that fetch its result."""
    told, place = answer.reply.get("telemetry", {}), answer.reply.get("result") or {}
    worker = Requests(int(told.get("s3_puts", 0)), int(told.get("s3_gets", 0)))
    result = reading(place.get("size")) if "key" in place else Requests()
    return (
        worker + result + (Requests(1, 1) if answer.stored else Requests())
    )  # a job's event goes over S3, its reply too


def at_most(event: Mapping[str, Any]) -> Requests:
    """Requests that running an event takes beyond sending it, at most, where its result is read in one piece."""
    out = event.get("out")
    if out is None:
        return Requests()
    stored = sum("key" in event[name] for name in ("fn", "args"))
    parts = sum((reading(part["size"]) for part in event.get("parts", ()) if "key" in part), Requests())
    return Requests(puts=2 if event.get("once") else 1, gets=stored + 1) + parts

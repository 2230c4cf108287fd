"""What to do with work that may not fit a function service: run it there, or on a batch service, and in which order.

The rules are those of SCAR (Risco and Moltó, 2021; its modes ``lambda``, ``lambda-batch`` and ``batch``): what needs a
GPU or more than a function can have goes to Batch, and so does what a function could not finish. Trying a function
first throws away what it did until its limit, so with enough seen of the work the order is chosen by what is expected:

    function first:  E[T; T ≤ τ] + P(T > τ) · (τ + L + E[B | T > τ])        batch first:  L + E[B]

with ``T`` the time as a function, ``τ`` its limit, ``B`` the time on Batch and ``L`` the wait until a job starts there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["lambda", "lambda-batch", "batch"]
Place = Literal["lambda", "batch"]
By = Literal["latency", "cost"]
DELEGATED = frozenset({"timeout", "memory", "disk", "throttled"})
"""Ends of an invocation that Batch may make good. Not a lost reply: the work may have been done."""

LEAST_SEEN = 5
"""Runs of the work that must have been seen before the order is chosen by expectation."""


@dataclass(frozen=True)
class Needs:
    """What work needs of its worker; 0 where nothing is known.

    Attributes:
        gpu: GPUs, or a share of one.
        memory_mb: Memory.
        storage_mb: Temporary disk.
        time_s: Time.
    """

    gpu: float = 0.0
    memory_mb: float = 0.0
    storage_mb: float = 0.0
    time_s: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What a function has at most."""

    memory_mb: float
    storage_mb: float
    time_s: float
    gpu: float = 0.0

    def holds(self, needs: Needs) -> bool:
        """Whether it can have what the work needs."""
        return all(getattr(needs, name) <= getattr(self, name) for name in ("gpu", "memory_mb", "storage_mb", "time_s"))


def first(mode: Mode, needs: Needs, limits: Limits) -> Place | None:
    """Where work is tried first by the rules; ``None`` where the mode has no place for it."""
    if mode == "batch":
        return "batch"
    if limits.holds(needs):
        return "lambda"
    return "batch" if mode == "lambda-batch" else None


def delegates(mode: Mode, end: str) -> bool:
    """Whether work whose invocation ended like this goes to Batch."""
    return mode == "lambda-batch" and end in DELEGATED


@dataclass(frozen=True)
class Seen:
    """Runs of the same work so far.

    Attributes:
        finished_s: Times of those that a function finished.
        overran: How many it did not, for lack of time or of memory.
        batch_s: Times on Batch of those.
        lost_s: Times that the function had spent on those; where none is known, its limit.
    """

    finished_s: tuple[float, ...] = ()
    overran: int = 0
    batch_s: tuple[float, ...] = ()
    lost_s: tuple[float, ...] = ()

    @property
    def runs(self) -> int:
        return len(self.finished_s) + self.overran


@dataclass(frozen=True)
class Terms:
    """What running costs, in time and money.

    Attributes:
        limit_s: Limit of a function.
        launch_s: Wait until a job starts on Batch.
        function_usd_s: US dollars a second as a function.
        batch_usd_s: US dollars a second on Batch.
        speed: How many times faster Batch is than the function.
        batch_least_s: What a job is billed at least.
    """

    limit_s: float
    launch_s: float
    function_usd_s: float = 0.0
    batch_usd_s: float = 0.0
    speed: float = 1.0
    batch_least_s: float = 0.0


def expected(seen: Seen, terms: Terms, by: By) -> tuple[float, float]:
    """Seconds or US dollars expected of trying a function first, and of Batch at once.

    Work that overran takes on Batch what it took there, or at least its limit.
    """
    n = max(seen.runs, 1)
    share = seen.overran / n
    finished = sum(seen.finished_s) / n
    longer = sum(seen.batch_s) / len(seen.batch_s) if seen.batch_s else terms.limit_s / terms.speed
    on_batch = finished / terms.speed + share * longer
    lost_s = sum(seen.lost_s) / len(seen.lost_s) if seen.lost_s else terms.limit_s
    if by == "latency":
        return finished + share * (lost_s + terms.launch_s + longer), terms.launch_s + on_batch
    least_s = terms.batch_least_s
    lost = lost_s * terms.function_usd_s + max(longer, least_s) * terms.batch_usd_s
    billed_s = sum(max(s / terms.speed, least_s) for s in seen.finished_s) / n + share * max(longer, least_s)
    return finished * terms.function_usd_s + share * lost, billed_s * terms.batch_usd_s


def predicted_first(
    mode: Mode, needs: Needs, limits: Limits, seen: Seen, terms: Terms, by: By = "latency"
) -> Place | None:
    """Where work is tried first: by the rules, and where they leave a choice by what is expected."""
    place = first(mode, needs, limits)
    if place != "lambda" or mode != "lambda-batch" or seen.runs < LEAST_SEEN:
        return place
    function_first, batch_first = expected(seen, terms, by)
    return "batch" if batch_first < function_first else "lambda"

"""Lambda first and Batch for what it can't do, or Batch at once: an exchange that chooses between two.

Whatever Batch then does carries the cost of what Lambda had done before; where both fail the error has both causes.
"""

from __future__ import annotations

import errno
import hashlib
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal

import cloudpickle

from prefect_slo.aws.exchange import Exchange, Item, Order, PartsGone, Returned
from prefect_slo.aws.invoke import NEVER_RAN, Failed
from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.control.delegation import By, Limits, Mode, Needs, Seen, Terms, delegates, predicted_first

KEPT = 200
"""Runs of one function that are remembered."""

LEARNT = frozenset({"timeout", "memory"})
"""Ends of an invocation that the next ones of the same work may well have, too."""


@dataclass
class Ends:
    """How the last runs of one function ended, however many there were before.

    Attributes:
        runs: Seconds of each as a function, and whether it was finished there.
        batch_s: Seconds on Batch of those that were not.
    """

    runs: deque[tuple[float, bool]] = field(default_factory=lambda: deque(maxlen=KEPT))
    batch_s: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    @property
    def seen(self) -> Seen:
        """What the order is chosen by."""
        finished = tuple(seconds for seconds, done in self.runs if done)
        lost = tuple(seconds for seconds, done in self.runs if not done)
        return Seen(finished, len(lost), tuple(self.batch_s), lost)


@dataclass
class Delegating:
    """Runs items on Lambda or on Batch.

    Args:
        lambdas: Sends work to Lambda.
        batch: Sends work to Batch.
        mode: SCAR's mode.
        needs: What the work needs.
        limits: What a function has.
        terms: What both cost, in time and money, by the name of the function.
        by: What the order is chosen by.
        clock: Seconds that pass.
    """

    lambdas: Exchange
    batch: Exchange
    mode: Mode
    needs: Needs
    limits: Limits
    terms: Callable[[str], Terms]
    by: By = "latency"
    clock: Callable[[], float] = time.monotonic
    _ends: dict[str, Ends] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def store(self) -> S3Prefix | None:
        """Where large things go."""
        return self.batch.store

    def paid(self, usd: Decimal) -> None:
        """Something beside was paid for."""
        self.batch.paid(usd)

    def run(self, function: str, order: Order) -> Returned:
        """Have a worker run items; see ``Exchange.run``.

        Raises:
            TooLarge: It does not fit into a request.
            Failed: Neither gave a result.
        """
        name = hashlib.sha256(order.code).hexdigest()
        place = predicted_first(self.mode, self.needs, self.limits, self._seen(name), self.terms(function), self.by)
        if place is None:
            raise Failed(
                "start", f"a function has {self.limits}; the work needs {self.needs}, and mode 'lambda' no Batch"
            )
        before: Failed | None = None
        if place == "lambda":
            begun = self.clock()
            try:
                returned = self.lambdas.run(function, order)
            except Failed as failed:
                if not delegates(self.mode, failed.why):
                    raise
                before = failed
                if failed.why in LEARNT:
                    self._note(name, min(self.clock() - begun, self.limits.time_s), finished=False)
            else:
                self._note(name, float(returned.telemetry.get("handler_s", 0.0)), finished=True)
                full = (
                    {one.item for one in returned.items if _filled_the_disk(one)} if order.kind == "function" else set()
                )
                if not full or not delegates(self.mode, "disk"):
                    return returned
                again = replace(order, items=[pair for pair in order.items if pair[0] in full])
                before = Failed("disk", "its temporary disk was full", billed=returned.answer.billed)
                before.storage_usd, before.lost = returned.storage_usd, returned.answer.lost
                try:
                    return _merged(returned, self._on_batch(name, before, function, again), order.ids)
                except Failed as failed:
                    return _without_batch(returned, full, failed, order.key)
        return self._on_batch(name, before, function, order)

    def _on_batch(self, name: str, before: Failed | None, function: str, order: Order) -> Returned:
        """Have a job run items, after what Lambda has tried ``before``; the cost is that of both."""
        try:
            returned = self.batch.run(function, replace(order, key=_on_batch_key(order.key)))
        except Exception as error:
            if before is None:
                raise
            raise _both(before, error) from error
        if before is None:
            return returned
        if before.why in LEARNT:
            with self._lock:
                self._ends[name].batch_s.append(float(returned.telemetry.get("handler_s", 0.0)))
        tried = returned.answer
        answer = replace(tried, billed=tried.billed + before.billed, lost=tried.lost + before.lost)
        return replace(returned, answer=answer, storage_usd=returned.storage_usd + before.storage_usd)

    def _seen(self, name: str) -> Seen:
        with self._lock:
            return self._ends.setdefault(name, Ends()).seen

    def _note(self, name: str, seconds: float, *, finished: bool) -> None:
        with self._lock:
            self._ends[name].runs.append((seconds, finished))


def _both(before: Failed, error: Exception) -> Failed:
    """What Batch could not do either, for whichever reason; it costs what both have taken.

    Where Batch has not begun it, it ended as it did on Lambda: it never ran only where it did not run there either.
    """
    then = error if isinstance(error, Failed) else Failed("died", f"{type(error).__name__}: {error}")
    last = before if then.why in NEVER_RAN and before.why not in NEVER_RAN else then
    words, billed = f"on Lambda: {before.detail}; then on Batch: {then.detail}", before.billed + then.billed
    both: Failed
    if isinstance(then, PartsGone) and before.why in NEVER_RAN:
        both = PartsGone(then.keys, words, billed)
        both.again = then.again
    else:
        both = Failed(last.why, words, used_mb=last.used_mb, memory_mb=last.memory_mb, billed=billed)
    both.storage_usd, both.on_batch = before.storage_usd + then.storage_usd, last.on_batch
    both.lost = before.lost + then.lost
    return both


def _filled_the_disk(one: Item) -> bool:
    """Whether an item failed because the temporary disk had no room; only it is run again, on Batch."""
    if not one.failed or one.unpicklable:
        return False
    try:
        value, _ = pickle.loads(one.payload)
    except Exception:  # said of the item where its outcome is looked at
        return False
    return isinstance(value, OSError) and value.errno == errno.ENOSPC


def _without_batch(returned: Returned, full: set[int], failed: Failed, key: tuple[str, ...]) -> Returned:
    """What Lambda gave, where Batch did not do what met a full disk: of that, its own error, with both causes."""
    return replace(
        returned,
        items=tuple(_noted(one, failed.detail) if one.item in full else one for one in returned.items),
        answer=replace(returned.answer, billed=failed.billed, lost=failed.lost),
        storage_usd=failed.storage_usd,
        stored=(*returned.stored, _on_batch_key(key)),
    )


def _noted(one: Item, words: str) -> Item:
    """An item that failed, with more words beside its traceback."""
    value, before = pickle.loads(one.payload)
    return one._replace(payload=cloudpickle.dumps((value, f"{before or ''}\n{words}".strip())))


def _on_batch_key(key: tuple[str, ...]) -> tuple[str, ...]:
    """What work is called on Batch that was tried on Lambda first."""
    return (*key, "batch")


def _merged(first: Returned, then: Returned, ids: Sequence[int]) -> Returned:
    """What both runs of some items gave, in order: of those that ran again, what they gave then."""
    latest = {one.item: one for one in (*first.items, *then.items)}
    return replace(
        then,
        items=tuple(latest[item] for item in ids if item in latest),
        chatter=(*first.chatter, *then.chatter),
        stored=(*first.stored, *then.stored),
    )

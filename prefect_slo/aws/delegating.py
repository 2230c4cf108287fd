"""Lambda first and Batch for what it can't do, or Batch at once: an exchange that chooses between two.

Whatever Batch then does carries the cost of what Lambda had done before; where both fail the error has both causes.
"""

from __future__ import annotations

import errno
import hashlib
import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal

from prefect_slo.aws.exchange import Exchange, Item, Kind, Returned
from prefect_slo.aws.invoke import Failed
from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.control.delegation import By, Limits, Mode, Needs, Seen, Terms, delegates, predicted_first

KEPT = 200
"""Runs of one function that are remembered."""


@dataclass
class Delegating:
    """Runs items on Lambda or on Batch.

    Args:
        lambdas: Sends work to Lambda.
        batch: Sends work to Batch.
        mode: SCAR's mode.
        needs: What the work needs.
        limits: What a function has.
        terms: What both cost, in time and money.
        by: What the order is chosen by.
    """

    lambdas: Exchange
    batch: Exchange
    mode: Mode
    needs: Needs
    limits: Limits
    terms: Terms
    by: By = "latency"
    _seen: dict[str, Seen] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def store(self) -> S3Prefix | None:
        """Where large things go."""
        return self.batch.store

    def run(
        self,
        function: str,
        kind: Kind,
        code: bytes,
        items: Sequence[tuple[int, bytes]],
        *,
        key: tuple[str, ...],
        limit_s: float | None,
        cancelled: threading.Event,
    ) -> Returned:
        """Have a worker run items; see ``Exchange.run``.

        Raises:
            TooLarge: It does not fit into a request.
            Failed: Neither gave a result.
        """
        name = hashlib.sha256(code).hexdigest()
        place = predicted_first(self.mode, self.needs, self.limits, self._seen.get(name, Seen()), self.terms, self.by)
        if place is None:
            raise Failed(
                "start", f"a function has {self.limits}; the work needs {self.needs}, and mode 'lambda' no Batch"
            )
        before: Failed | None = None
        if place == "lambda":
            try:
                returned = self.lambdas.run(function, kind, code, items, key=key, limit_s=limit_s, cancelled=cancelled)
            except Failed as failed:
                if not delegates(self.mode, failed.why):
                    raise
                before = failed
                self._note(name, overran=failed.why == "timeout")
            else:
                self._note(name, finished_s=float(returned.telemetry.get("handler_s", 0.0)))
                full = [one.item for one in returned.items if _filled_the_disk(one)] if kind == "function" else []
                if not full or not delegates(self.mode, "disk"):
                    return returned
                again = [pair for pair in items if pair[0] in full]
                before = Failed("died", "its temporary disk was full", billed=returned.answer.billed)
                moved = self._on_batch(name, before, function, kind, code, again, key, limit_s, cancelled)
                return _merged(returned, moved, items)
        return self._on_batch(name, before, function, kind, code, items, key, limit_s, cancelled)

    def _on_batch(
        self,
        name: str,
        before: Failed | None,
        function: str,
        kind: Kind,
        code: bytes,
        items: Sequence[tuple[int, bytes]],
        key: tuple[str, ...],
        limit_s: float | None,
        cancelled: threading.Event,
    ) -> Returned:
        """Have a job run items, after what Lambda has tried ``before``; the cost is that of both."""
        try:
            returned = self.batch.run(
                function, kind, code, items, key=(*key, "batch"), limit_s=limit_s, cancelled=cancelled
            )
        except Failed as failed:
            if before is None:
                raise
            both = f"on Lambda: {before.detail}; then on Batch: {failed.detail}"
            raise Failed(
                failed.why,
                both,
                used_mb=failed.used_mb,
                memory_mb=failed.memory_mb,
                billed=before.billed + failed.billed,
            ) from None
        if before is not None and before.why == "timeout":
            self._note(name, batch_s=float(returned.telemetry.get("handler_s", 0.0)))
        lost = before.billed if before is not None else Decimal()
        return replace(returned, answer=replace(returned.answer, billed=returned.answer.billed + lost))

    def _note(
        self, name: str, *, finished_s: float | None = None, overran: bool = False, batch_s: float | None = None
    ) -> None:
        with self._lock:
            seen = self._seen.get(name, Seen())
            if finished_s is not None:
                seen = replace(seen, finished_s=(*seen.finished_s, finished_s)[-KEPT:])
            if batch_s is not None:
                seen = replace(seen, batch_s=(*seen.batch_s, batch_s)[-KEPT:])
            self._seen[name] = replace(seen, overran=seen.overran + overran)


def _filled_the_disk(one: Item) -> bool:
    """Whether an item failed because the temporary disk had no room; only it is run again, on Batch."""
    if not one.failed or one.unpicklable:
        return False
    try:
        value, _ = pickle.loads(one.payload)
    except Exception:  # said of the item where its outcome is looked at
        return False
    return isinstance(value, OSError) and value.errno == errno.ENOSPC


def _merged(first: Returned, then: Returned, items: Sequence[tuple[int, bytes]]) -> Returned:
    """What both runs of some items gave, in order: of those that ran again, what they gave then."""
    latest = {one.item: one for one in (*first.items, *then.items)}
    return replace(
        then,
        items=tuple(latest[item] for item, _ in items if item in latest),
        chatter=(*first.chatter, *then.chatter),
        stored=(*first.stored, *then.stored),
    )

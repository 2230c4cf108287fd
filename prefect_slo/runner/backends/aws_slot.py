"""A slot for leases on AWS: one thread that makes their invocations, one after another, and tells what they took."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import count
from queue import SimpleQueue
from threading import Thread
from typing import Any

from prefect_slo.aws.delegating import Delegating
from prefect_slo.aws.exchange import Exchange, Item, Kind, Order, PartsGone, Returned, TooLarge
from prefect_slo.aws.invoke import Failed
from prefect_slo.aws.kept import KeptObject, Place, Value
from prefect_slo.aws.refusals import PACKAGES
from prefect_slo.aws.report import NOTHING, Billed
from prefect_slo.control.events import LossReason
from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import (
    Apart,
    Bundle,
    Carried,
    Chatter,
    Finished,
    HostedProgram,
    ItemReport,
    Kept,
    Lost,
    NotSent,
    Outcome,
    Overran,
    Progress,
    Sink,
    WorkerGone,
)

REASONS: dict[str, LossReason] = {
    "memory": "memory", "timeout": "timeout", "start": "start", "throttled": "start", "unreached": "start",
}  # fmt: skip
"""Losses that the scheduler knows by these names; every other is a worker that died."""


class Slot:
    """One thread that makes a lease's invocations, one after another."""

    _names = count(1)

    def __init__(
        self,
        exchange: Exchange | Delegating,
        run_key: str,
        freed: Callable[[int], None],
        stored: set[tuple[str, ...]],
        place: Place | None = None,
    ) -> None:
        self._exchange, self._run_key, self._freed, self._stored = exchange, run_key, freed, stored
        self._place = place
        self.inbox: SimpleQueue[Bundle | None] = SimpleQueue()
        self._lease, self._function, self._size = 0, "", Size(1, 128)
        self._sink: Sink = _unheard
        self._cancelled = threading.Event()
        self._bundle: Bundle | None = None
        self._untouched: tuple[int, ...] = ()
        self._order: Order | None = None
        self._totals = _Totals()
        self._telling = threading.Lock()  # what is told of a bundle is told once: at its end, or when it is cancelled
        self._thread = Thread(target=self._run, name=f"prefect-slo-lambda-{next(self._names)}", daemon=True)
        self._thread.start()

    @property
    def memory_mb(self) -> int:
        """The size that it serves."""
        return self._size.memory_mb

    def serve(self, lease: int, function: str, size: Size, sink: Sink) -> None:
        self._lease, self._function, self._size, self._sink = lease, function, size, sink

    def abandon(self) -> None:
        """Report the lease as lost, and hear nothing more of it."""
        self._cancelled.set()
        self.inbox.put(None)
        with self._telling:
            sink, self._sink = self._sink, _unheard
            lost = self._cancelled_now()
        sink(lost)

    def _cancelled_now(self) -> Lost:
        """The report of a lease that is cancelled; what has been sent goes on, unheard."""
        bundle, totals = self._bundle, self._totals
        ids = [item for item, _ in bundle.items] if bundle is not None else []
        goes_on = self._order is not None and self._order.sent.is_set()
        return Lost(
            self._lease,
            "cancelled",
            "cancelled",
            next((item for item in ids if item not in self._untouched), None),
            self._untouched,
            bundle=bundle.id if bundle is not None else None,
            billed_usd=totals.usd,
            requests=totals.billed.requests,
            storage_usd=totals.storage_usd,
            untold=totals.untold + goes_on,
        )

    def end(self) -> None:
        self._sink = _unheard
        self._cancelled.set()
        self.inbox.put(None)

    def _run(self) -> None:
        while (bundle := self.inbox.get()) is not None and not self._cancelled.is_set():
            self._bundle, self._untouched = bundle, tuple(item for item, _ in bundle.items)
            totals = self._totals = _Totals()
            received = time.monotonic()
            try:
                if isinstance(bundle.program, HostedProgram):
                    self._host(bundle, bundle.program, totals)
                else:
                    self._ship(bundle, totals)
            except _Gone as gone:
                self._lose(gone, bundle, totals)
                continue
            except BaseException as error:  # a defect: without a report the flow would wait for ever
                detail = f"{type(error).__name__}: {error}"
                self._lose(_Gone(Failed("died", detail), self._untouched), bundle, totals)
                continue
            self._ended()(totals.finished(self._lease, bundle.id, received))

    def _lose(self, gone: _Gone, bundle: Bundle, totals: _Totals) -> None:
        """Report the lease as lost. Before that it is given back: this slot may serve another at once."""
        sink, lost = self._ended(), gone.lost(self._lease, bundle, totals, self._size)
        self._freed(self._lease)
        sink(lost)

    def _ended(self) -> Sink:
        """A bundle is over; returns who hears of it."""
        with self._telling:
            self._bundle, self._totals = None, _Totals()
            return self._sink

    def _host(self, bundle: Bundle, program: HostedProgram, totals: _Totals) -> None:
        """The engine's calls, each an invocation; or all of the bundle's in one, without it."""
        numbers = count(1)

        def carry(
            function: bytes,
            arguments: Sequence[tuple[int, bytes]],
            *,
            limit_s: float | None = None,
            parts: Sequence[Apart | Kept] = (),
        ) -> list[Carried]:
            sent, before = {item for item, _ in arguments}, self._untouched
            self._untouched = tuple(item for item in before if item not in sent)
            try:
                order = replace(
                    self._ordered(bundle, "function", function, arguments, next(numbers), limit_s),
                    parts=tuple(map(_part, parts)),
                    keep=bundle.keep,
                )
                returned = self._invoke(order, totals)
            except TooLarge as error:
                self._untouched = before
                raise NotSent(str(error)) from None
            if returned.overran is not None:
                raise Overran(f"it ran longer than {limit_s:g} s")
            return [_carried(one, started, ended, self._kept(one)) for one, started, ended in _timed(returned)]

        def report(done: ItemReport) -> None:
            self._untouched = tuple(item for item in self._untouched if item != done.item)
            self._sink(Progress(self._lease, bundle.id, (done,)))

        program.host(bundle.items, carry, report)

    def _kept(self, one: Item) -> KeptObject | None:
        """The value of an item that has stayed on S3."""
        if one.left is None:
            return None
        assert self._place is not None
        return KeptObject(self._place, *one.left, paid=self._exchange.paid)

    def _ship(self, bundle: Bundle, totals: _Totals) -> None:
        """A pickled program and its items, in one invocation."""
        self._untouched = ()
        try:
            order = self._ordered(bundle, "program", bundle.program, bundle.items, 1, bundle.timeout_s)
            returned = self._invoke(order, totals)
        except TooLarge as error:
            stuck = tuple(ItemReport(i, Outcome(b"", True, str(error)), 0.0, 0.0) for i, _ in bundle.items)
            self._sink(Progress(self._lease, bundle.id, stuck))
            return
        for payload in returned.chatter:
            self._sink(Chatter(self._lease, payload))
        done = tuple(
            ItemReport(
                one.item, Outcome(one.payload, one.failed, one.unpicklable, one.read_s, one.write_s), started, ended
            )
            for one, started, ended in _timed(returned)
        )
        if done:
            self._sink(Progress(self._lease, bundle.id, done))
        if returned.overran is not None:
            ids = [item for item, _ in bundle.items]
            after = tuple(ids[ids.index(returned.overran) + 1 :])
            raise _Gone(Failed("timeout", f"an item ran longer than {bundle.timeout_s:g} s"), after, returned.overran)

    def _ordered(
        self, bundle: Bundle, kind: Kind, code: bytes, items: Sequence[tuple[int, bytes]], n: int, limit_s: float | None
    ) -> Order:
        """The n-th call of a bundle."""
        return Order(kind, code, items, ("runs", self._run_key, str(bundle.id), str(n)), limit_s, self._cancelled)

    def _invoke(self, order: Order, totals: _Totals) -> Returned:
        key, ids = order.key, order.ids
        names = {key, (*key, "batch")} if isinstance(self._exchange, Delegating) else {key}
        if self._cancelled.is_set():
            raise _Gone(Failed("cancelled", "cancelled before it was sent"), (*ids, *self._untouched))
        values = {order.shared(part) for part in order.parts if isinstance(part, Value)}
        self._stored |= names | values  # before anything is: whatever becomes of the call, it is deleted
        self._order = order
        try:
            returned = self._exchange.run(self._function, order)
            _checked(returned, ids)
        except Failed as failed:
            with self._telling:
                totals.bill(failed.billed, failed.storage_usd, failed.lost)
                self._order = None
            if isinstance(failed, PartsGone):  # nothing of it has run
                raise _Gone(failed, (*ids, *self._untouched), inputs_gone=failed.again) from None
            if REASONS.get(failed.why) == "start":  # nor has it here
                raise _Gone(failed, (*ids, *self._untouched)) from None
            raise _Gone(failed, self._untouched, ids[0] if len(ids) == 1 else None) from None
        else:
            with self._telling:
                totals.add(returned)
                self._order = None
        finally:
            self._order = None
        if not returned.stored:
            self._stored -= names
        return returned


@dataclass
class _Totals:
    """What the invocations of one bundle took together."""

    init_s: float = 0.0
    waited_s: float = 0.0
    open_s: float = 0.0
    read_s: float = 0.0
    dump_s: float = 0.0
    write_s: float = 0.0
    cpu_s: float = 0.0
    peak_mb: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    billed: Billed = NOTHING
    storage_usd: Decimal = Decimal()
    untold: int = 0

    def add(self, returned: Returned) -> None:
        told, report = returned.telemetry, returned.answer.report
        init_s = report.init_ms / 1000 if report is not None else 0.0
        opened_s = sum(told.get(name, 0.0) for name in ("claim_s", "read_s", "load_s"))
        self.init_s += init_s
        self.waited_s += returned.answer.waited_s
        self.open_s += init_s + returned.answer.waited_s + opened_s
        self.read_s += told.get("read_s", 0.0)
        self.dump_s += told.get("dump_s", 0.0)
        self.write_s += told.get("write_s", 0.0)
        self.cpu_s += told.get("cpu_s", 0.0)
        self.peak_mb = max(self.peak_mb, told.get("peak_mb", 0.0), float(report.used_mb) if report is not None else 0.0)
        self.bytes_in += told.get("bytes_in", 0)
        self.bytes_out += told.get("bytes_out", 0)
        self.bill(returned.answer.billed, returned.storage_usd, returned.answer.lost)

    def bill(self, billed: Billed, storage_usd: Decimal, untold: int) -> None:
        """Add what an invocation, or all that was tried for it, is billed, and what its objects cost.

        Args:
            billed: What it is billed, as far as it is told.
            storage_usd: Of its objects.
            untold: Tries whose bills nobody has told.
        """
        self.billed += billed
        self.storage_usd += storage_usd
        self.untold += untold

    @property
    def usd(self) -> Decimal:
        """All of it."""
        return self.billed.usd + self.storage_usd

    def finished(self, lease: int, bundle: int, received: float) -> Finished:
        """The report of a bundle that ends now."""
        return Finished(
            lease,
            bundle,
            received,
            time.monotonic(),
            open_s=self.open_s,
            cpu_s=self.cpu_s,
            peak_mb=self.peak_mb,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            init_s=self.init_s,
            billed_usd=self.usd,
            requests=self.billed.requests,
            storage_usd=self.storage_usd,
            waited_s=self.waited_s,
            read_s=self.read_s,
            dump_s=self.dump_s,
            write_s=self.write_s,
            billed_ms=self.billed.ms,
            untold=self.untold,
        )


class _Gone(WorkerGone):
    """A bundle whose worker is lost; passes whatever lies between."""

    def __init__(
        self, failed: Failed, untouched: tuple[int, ...], running: int | None = None, *, inputs_gone: bool = False
    ) -> None:
        self.failed, self.untouched, self.running, self.inputs_gone = failed, untouched, running, inputs_gone
        super().__init__(str(failed))

    def lost(self, lease: int, bundle: Bundle, totals: _Totals, size: Size) -> Lost:
        """The report of it."""
        failed = self.failed
        return Lost(
            lease,
            REASONS.get(failed.why, "died"),
            failed.detail,
            self.running,
            self.untouched,
            peak_mb=failed.used_mb,
            limit_mb=failed.memory_mb or float(size.memory_mb),
            bundle=bundle.id,
            billed_usd=totals.usd,
            requests=totals.billed.requests,
            storage_usd=totals.storage_usd,
            on_batch=failed.on_batch,
            inputs_gone=self.inputs_gone,
            untold=totals.untold,
        )


def _checked(returned: Returned, sent: Sequence[int]) -> None:
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


def _timed(returned: Returned) -> list[tuple[Any, float, float]]:
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


def _part(part: Apart | Kept) -> KeptObject | Value:
    """A part of arguments as an order has it."""
    if isinstance(part, Apart):
        return Value(part.sha, part.content)
    assert isinstance(part, KeptObject)
    return part


def _carried(one: Item, started: float, ended: float, kept: KeptObject | None = None) -> Carried:
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
                value.add_note(f"On the worker:\n{words}")
                if isinstance(value, ModuleNotFoundError):
                    value.add_note(PACKAGES)
    return Carried(value, one.failed, unpicklable, one.read_s, one.write_s, started, ended, kept)


def _unheard(_: Any) -> None:
    """The sink of a slot that nobody listens to any more."""

"""Sees to it that kept results are there where calls take them: fetches what lies elsewhere, in threads of its own.

The thread that runs a flow never waits for a fetch: a call that lacks something is put aside until that has come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import Context
from queue import SimpleQueue
from typing import Any

from prefect.futures import PrefectConcurrentFuture
from prefect.utilities.annotations import quote
from prefect.utilities.collections import StopVisiting, visit_collection

from prefect_slo.errors import ResultLost
from prefect_slo.runner.calls import Call
from prefect_slo.runner.deposits import Deposit, Deposits, KeptRecord

AT_ONCE = 4
"""Fetches under way at once, begun in the order that they are asked for."""

Look = Callable[[int, BaseException | None], None]


class Supplies:
    """What the calls of one flow run take that lies elsewhere.

    Args:
        deposits: Values that stay elsewhere.
        again: Has a lost one made again; ``None`` where that may not be or can't.
        look: Called from any thread when it is worth asking again whether an item lacks something, or with what has
            gone wrong for good.
        home: Called from any thread when ``all_here`` has become true.
        context: The flow's context: results may have to be read from its storage.
    """

    def __init__(
        self,
        deposits: Deposits,
        again: Callable[[Deposit], Future[bool] | None],
        *,
        look: Look,
        home: Callable[[], None],
        context: Context,
    ) -> None:
        self._deposits, self._again, self._look, self._home, self._context = deposits, again, look, home, context
        self._at_home: threading.Event | None = None
        self._orders: SimpleQueue[tuple[int, list[KeptRecord]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def lacking(self, call: Call, place: object) -> list[KeptRecord]:
        """What a call takes that can't go to a place as it is."""
        if not (call.has_inputs and self._deposits):
            return []
        return [record for record in _kept_in(call) if not record.goes_to(place)]

    def order(self, item: int, records: list[KeptRecord]) -> None:
        """See to what an item lacks; ``look`` is called when that is done, or can't be."""
        for record in records:
            if (lost := record.lost()) is not None:
                if (remade := self._again(record.deposit)) is None:
                    self._look(item, lost)
                else:
                    remade.add_done_callback(lambda _: self._look(item, None))
                return
        self._orders.put((item, records))
        if len(self._threads) < AT_ONCE:
            self._threads.append(self._start(self._fetch))

    def all_here(self) -> bool:
        """Whether what somebody may read after the run has come, or can't any more; it is fetched from now on."""
        if self._at_home is None and self._deposits:
            self._at_home = threading.Event()
            self._start(self._bring, self._at_home)
        return self._at_home is None or self._at_home.is_set()

    def close(self) -> None:
        """Fetch nothing more."""
        self._closed = True
        for _ in self._threads:
            self._orders.put(None)

    def _start(self, work: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(
            target=self._context.copy().run, args=(work, *args), name="prefect-slo-fetch", daemon=True
        )
        thread.start()
        return thread

    def _bring(self, done: threading.Event) -> None:
        try:
            self._deposits.bring()
        finally:
            done.set()
            self._home()

    def _fetch(self) -> None:
        while (order := self._orders.get()) is not None and not self._closed:
            item, records = order
            error: BaseException | None = None
            try:
                for record in records:
                    record.bring()
            except ResultLost:
                pass  # its deposit knows
            except BaseException as raised:  # the item ends with it; the thread has others to see to
                error = raised
            del order, records  # what is let go of meanwhile is not held here
            self._look(item, error)


def _kept_in(call: Call) -> list[KeptRecord]:
    """Results among a call's arguments that stay elsewhere. What it only waits for needs no value."""
    found: dict[int, KeptRecord] = {}

    def look(value: Any, context: dict[str, Any]) -> None:
        if isinstance(context.get("annotation"), quote):
            raise StopVisiting
        if isinstance(value, PrefectConcurrentFuture):
            value = _record_of(value.wrapped_future)
        if isinstance(value, KeptRecord):
            found[id(value)] = value

    visit_collection(list(call.parameters.values()), look, return_data=False, context={})
    return list(found.values())


def _record_of(future: Future[Any]) -> Any:
    if not future.done() or future.cancelled() or future.exception() is not None:
        return None
    return future.result().data

"""How a kept result can be made again: the call that made it, held for as long as its result lies elsewhere.

What a call took from others is not kept alive for this: where the flow has let go of an upstream future, what it led to
is not made again. Arguments of its own are held as they were sent, in all no more than ``ROOM_BYTES`` of a flow
run: what the flow has made of them since would make another result.
"""

from __future__ import annotations

import io
import pickle
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.results import ResultRecord  # type: ignore[attr-defined]
from prefect.utilities.annotations import quote
from prefect.utilities.collections import StopVisiting, visit_collection

from prefect_slo.runner.calls import ATOMS, Call, FinalState

ROOM_BYTES = 64 * 2**20
"""Arguments, pickled, that a flow run holds on to for this."""

NOTED_BYTES = 64 * 2**10
"""An argument of at least this size, pickled, is remembered with it: whoever has no room for it need not pickle it."""

_NOTED = 10_000


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Origin:
    """A call whose upstream futures and states are held weakly.

    Attributes:
        call: The call, without parameters that may change.
        pickled: Those, as they were sent, one after another with their names.
        count: How many those are.
        others: What they take from others, by number.
    """

    call: Call
    pickled: bytes
    count: int = 0
    others: tuple[weakref.ref[Any], ...] = ()

    def again(self, item: int) -> Call | None:
        """The call as a new item; ``None`` where the flow has let go of what it takes, or it is unreadable."""
        call = self.call
        try:
            loads = _Unpickler(self.pickled, self.others).load
            parameters = call.parameters | dict(loads() for _ in range(self.count))
        except BaseException:  # whatever unpickling raises
            return None
        awaited = [_visited(value, _held_or_none) for value in call.wait_for or ()]
        return replace(
            call, item=item, parameters=parameters, wait_for=awaited or None, future=FinalState(), late=False
        )


class Origins:
    """Those of one flow run, within ``ROOM_BYTES``."""

    def __init__(self) -> None:
        self._left = ROOM_BYTES
        self._noted: dict[tuple[Any, ...], int] = {}

    def of(self, call: Call) -> Origin | None:
        """The origin of the result of a call that is being sent; ``None`` where its arguments are too many to hold."""
        fixed = {name: value for name, value in call.parameters.items() if isinstance(value, ATOMS)}
        room = self._left - sum(len(value) for value in fixed.values() if isinstance(value, str | bytes))
        own = {name: value for name, value in call.parameters.items() if name not in fixed}
        if room < max((self._noted.get(_looks(value), 0) for value in own.values()), default=0):
            return None
        others: list[weakref.ref[Any]] = []
        try:
            pickled = _dumped(own, others, room, self._note)
        except Exception:  # too large, or it travels by other means, which leave nothing to hold
            return None
        wait_for = [_visited(value, _loosened) for value in call.wait_for or ()]
        # its own future has its result, which would hold on to itself
        kept = replace(call, parameters=fixed, wait_for=wait_for or None, future=FinalState(), origin=None)
        origin = Origin(kept, pickled, len(own), tuple(others))
        taken = self._left - room + len(pickled)
        self._left -= taken
        weakref.finalize(origin, self._free, taken).atexit = False
        return origin

    def _note(self, value: Any, least: int) -> None:
        """An argument takes so many bytes, at least."""
        if least >= NOTED_BYTES:
            if len(self._noted) >= _NOTED:
                self._noted.clear()
            self._noted[_looks(value)] = least

    def _free(self, size: int) -> None:
        self._left += size


class _LetGo(Exception):
    """Nobody holds what a call takes any more."""


class _Room(io.BytesIO):
    """Takes no more than so many bytes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._left = size

    def write(self, content: Any) -> int:
        self._left -= memoryview(content).nbytes
        if self._left < 0:
            raise OverflowError
        return super().write(content)


def _looks(value: Any) -> tuple[Any, ...]:
    """What an argument is known by that many calls take, and that is not to be held for this."""
    try:
        size = len(value)
    except Exception:  # it has none, or none that can be told
        size = None
    return id(value), type(value), size


def _dumped(
    parameters: dict[str, Any], others: list[weakref.ref[Any]], room: int, note: Callable[[Any, int], None]
) -> bytes:
    """Parameters pickled, but for what they take from others, which is a number of ``others``.

    Args:
        parameters: By name.
        others: Gets what they take from others.
        room: Bytes that they may take.
        note: Told of each how many bytes it takes, or at least would.

    Raises:
        OverflowError: It is more than there is ``room`` for.
    """
    buffer = _Room(room)
    pickler = cloudpickle.Pickler(buffer)

    def number(found: Any) -> int | None:
        if not isinstance(found, PrefectFuture | State | ResultRecord):
            return None
        others.append(weakref.ref(found))
        return len(others) - 1

    pickler.persistent_id = number
    for name, value in parameters.items():
        before = buffer.tell()
        try:
            pickler.dump((name, value))
        except OverflowError:
            note(value, room - before + 1)
            raise
        note(value, buffer.tell() - before)
    return buffer.getvalue()


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, others: Sequence[weakref.ref[Any]]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._others = others

    def persistent_load(self, number: int) -> Any:
        if (found := self._others[number]()) is None:
            raise _LetGo
        return found


def _visited(value: Any, replacing: Callable[[Any], Any]) -> Any:
    def visit(found: Any, context: dict[str, Any]) -> Any:
        if isinstance(context.get("annotation"), quote):
            raise StopVisiting
        return replacing(found)

    return visit_collection(value, visit, return_data=True, context={})


def _loosened(found: Any) -> Any:
    return weakref.ref(found) if isinstance(found, PrefectFuture | State) else found


def _held_or_none(found: Any) -> Any:
    """What was waited for is an edge, and no more: it need not be there any more."""
    return found() if isinstance(found, weakref.ref) else found

"""How a kept result can be made again: the call that made it, held for as long as its result lies elsewhere.

What a call took from others is not kept alive for this: where the flow has let go of an upstream future, what it led to
is not made again. Arguments of its own are held, in all no more than ``ROOM_BYTES`` of a flow run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.utilities.annotations import quote
from prefect.utilities.collections import StopVisiting, visit_collection

from prefect_slo.runner.calls import Call, FinalState

ROOM_BYTES = 64 * 2**20
"""Arguments, pickled, that a flow run holds on to for this."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Origin:
    """A call whose upstream futures and states are held weakly."""

    call: Call

    def again(self, item: int) -> Call | None:
        """The call as a new item; ``None`` where the flow has let go of something that it takes."""
        call = self.call
        try:
            parameters = {name: _visited(value, _held) for name, value in call.parameters.items()}
        except _LetGo:
            return None
        awaited = [_visited(value, _held_or_none) for value in call.wait_for or ()]
        return replace(
            call, item=item, parameters=parameters, wait_for=awaited or None, future=FinalState(), late=False
        )


class Origins:
    """Those of one flow run, within ``ROOM_BYTES``."""

    def __init__(self) -> None:
        self._left = ROOM_BYTES

    def of(self, call: Call) -> Origin | None:
        """The origin of a call's result; ``None`` where its arguments are too many to hold."""
        if call.sent_bytes > self._left:
            return None
        parameters, wait_for = call.parameters, call.wait_for
        if call.has_inputs:
            parameters = {name: _visited(value, _loosened) for name, value in parameters.items()}
            wait_for = [_visited(value, _loosened) for value in wait_for or ()]
        # its own future has its result, which would hold on to itself
        origin = Origin(replace(call, parameters=parameters, wait_for=wait_for, future=FinalState()))
        self._left -= call.sent_bytes
        weakref.finalize(origin, self._free, call.sent_bytes).atexit = False
        return origin

    def _free(self, sent_bytes: int) -> None:
        self._left += sent_bytes


class _LetGo(Exception):
    """Nobody holds what a call takes any more."""


def _visited(value: Any, replacing: Callable[[Any], Any]) -> Any:
    def visit(found: Any, context: dict[str, Any]) -> Any:
        if isinstance(context.get("annotation"), quote):
            raise StopVisiting
        return replacing(found)

    return visit_collection(value, visit, return_data=True, context={})


def _loosened(found: Any) -> Any:
    return weakref.ref(found) if isinstance(found, PrefectFuture | State) else found


def _held(found: Any) -> Any:
    if isinstance(found, weakref.ref) and found() is None:
        raise _LetGo
    return _held_or_none(found)


def _held_or_none(found: Any) -> Any:
    """What was waited for is an edge, and no more: it need not be there any more."""
    return found() if isinstance(found, weakref.ref) else found

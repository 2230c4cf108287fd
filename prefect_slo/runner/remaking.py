"""Has kept results that are lost made again: the call that made one runs once more, where it may.

A call may where its items may run again after their worker was lost while they ran (``loss_retries``: its task's own
retries, more where it is declared idempotent, none where declared not), and once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from prefect.client.schemas.objects import State

from prefect_slo.runner.calls import Call
from prefect_slo.runner.deposits import Deposit
from prefect_slo.runner.origins import Origin, Origins


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody reads a result that is lost, and waits for whether it stands for a value again."""

    deposit: Deposit
    answer: Future[bool]


class Remaking:
    """Calls of one flow run that run again. For the session's thread, but for ``wait``.

    Args:
        items: Ids for calls.
        submit: Submits a call.
        ask: Has the session hear of something that is asked from another thread; false where it is over.
        heard: Told of each call, and why its result is lost.
    """

    def __init__(
        self,
        items: Iterator[int],
        submit: Callable[[Call], None],
        ask: Callable[[Asked], bool],
        heard: Callable[[Call, str], None],
    ) -> None:
        self._items, self._submit, self._ask, self._heard = items, submit, ask, heard
        self._origins = Origins()
        self._ended = False

    def origin(self, call: Call, loss_retries: int) -> Origin | None:
        """How the result of a call that is being sent can be made again, where that may be."""
        return self._origins.of(call) if loss_retries > 0 else None

    def again(self, deposit: Deposit) -> Future[bool] | None:
        """Make a lost result again: whether it stands for a value again; ``None`` where that may not be, or can't."""
        if deposit.remade is not None:
            return None if deposit.remade.done() else deposit.remade
        if deposit.origin is None or self._ended or (call := deposit.origin.again(next(self._items))) is None:
            return None
        lost, made = deposit.lost(), Future[bool]()
        deposit.remade = made
        self._heard(call, lost.why if lost is not None else "")
        call.future.add_done_callback(lambda over: made.set_result(deposit.renew(_final(over))))
        self._submit(call)
        return made

    def answer(self, asked: Asked) -> None:
        """Tell whoever asked, once it is known."""
        if (made := self.again(asked.deposit)) is None:
            asked.answer.set_result(asked.deposit.lost() is None)
        else:
            made.add_done_callback(lambda over: asked.answer.set_result(over.result()))

    def wait(self, deposit: Deposit) -> bool:
        """From any other thread: have a lost result made again; whether it stands for a value again."""
        if deposit.origin is None:
            return False
        asked = Asked(deposit, Future())
        return self._ask(asked) and asked.answer.result()

    def end(self) -> None:
        """Make nothing again any more."""
        self._ended = True


def _final(over: Future[State[Any]]) -> State[Any] | None:
    """The final state of a call; ``None`` where it was dropped, or raised instead of ending in one."""
    return None if over.cancelled() or over.exception() is not None else over.result()

"""A cap on what a run spends on AWS: kept by never having more under way than could still be paid for."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

from prefect_slo.aws.invoke import Answer, Failed
from prefect_slo.errors import SpendLimitReached

WAKE_S = 0.5


class Caller(Protocol):
    """Has one event run: on Lambda (``Invoker``) or on Batch (``BatchInvoker``)."""

    def call(self, function: str, event: dict[str, Any], *, again: bool, cancelled: threading.Event) -> Answer:
        """Have a function run an event; raises ``Failed`` where it gave no result."""
        ...


@dataclass
class SpendLimit:
    """What may be spent, by any number of threads.

    What is under way counts as much as the dearest that was seen. With nothing under way one more may start as long as
    anything is left, so the cap is passed by less than one invocation, as far as the dearest seen says what one costs.

    Args:
        most_usd: The cap.
    """

    most_usd: Decimal
    spent_usd: Decimal = Decimal()
    _dearest: Decimal = Decimal()
    _under_way: int = 0
    _news: threading.Condition = field(default_factory=threading.Condition)

    def enter(self, cancelled: threading.Event) -> None:
        """Wait until one more may start.

        Raises:
            SpendLimitReached: There is nothing left for it.
            Failed: Nobody wants it any more.
        """
        with self._news:
            while True:
                if self.spent_usd >= self.most_usd:
                    raise SpendLimitReached(float(self.most_usd), float(self.spent_usd))
                if not self._under_way or self._fits():
                    self._under_way += 1
                    return
                if cancelled.is_set():
                    raise Failed("cancelled", "cancelled while it waited for money to be left")
                self._news.wait(WAKE_S)

    def leave(self, billed: Decimal) -> None:
        """One has ended, and is billed."""
        with self._news:
            self._under_way -= 1
            self.spent_usd += billed
            self._dearest = max(self._dearest, billed)
            self._news.notify_all()

    def _fits(self) -> bool:
        """Whether one more fits beside what is under way; unknown before the first has ended."""
        return bool(self._dearest) and self.spent_usd + (self._under_way + 1) * self._dearest <= self.most_usd


@dataclass
class CappedCaller:
    """A caller under a cap, which others may share."""

    caller: Caller
    limit: SpendLimit

    def call(self, function: str, event: dict[str, Any], *, again: bool, cancelled: threading.Event) -> Answer:
        """Have a function run an event, if that can be paid for.

        Raises:
            SpendLimitReached: It can't.
            Failed: It gave no result.
        """
        self.limit.enter(cancelled)
        billed = Decimal()
        try:
            answer = self.caller.call(function, event, again=again, cancelled=cancelled)
            billed = answer.billed
        except Failed as failed:
            billed = failed.billed
            raise
        finally:
            self.limit.leave(billed)
        return answer

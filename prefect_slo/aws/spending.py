"""A cap on what a run spends on AWS: kept by never having more under way than could still be paid for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

from prefect_slo.aws.invoke import Answer, Failed, always
from prefect_slo.aws.storage import at_most, of_answer
from prefect_slo.errors import SpendLimitReached

WAKE_S = 0.5


class Caller(Protocol):
    """Has one event run: on Lambda (``Invoker``) or on Batch (``BatchInvoker``)."""

    def call(
        self,
        function: str,
        event: dict[str, Any],
        *,
        again: bool,
        cancelled: threading.Event,
        sent: threading.Event | None = None,
        more: Callable[[], bool] = always,
    ) -> Answer:
        """Have a function run an event; raises ``Failed`` where it gave no result.

        ``sent`` is set as long as something may be billed of which nothing has been heard.
        """
        ...


@dataclass
class SpendLimit:
    """What may be spent, by any number of threads.

    What is under way counts with the most that it can cost: its whole timeout. With nothing under way one more may
    start as long as anything is left, so the cap is passed by less than one invocation, whatever they cost; one that
    is made again after its reply was lost counts for each of its tries.

    Args:
        most_usd: The cap.
    """

    most_usd: Decimal
    spent_usd: Decimal = Decimal()
    _under_way: Decimal = Decimal()
    _news: threading.Condition = field(default_factory=threading.Condition)

    def add(self, usd: Decimal) -> None:
        """Something else was paid for."""
        with self._news:
            self.spent_usd += usd

    def enter(self, worst_usd: Decimal, cancelled: threading.Event) -> None:
        """Wait until one more may start that costs so much at most.

        Raises:
            SpendLimitReached: There is nothing left for it.
            Failed: Nobody wants it any more.
        """
        with self._news:
            while True:
                if self.spent_usd >= self.most_usd:
                    raise SpendLimitReached(float(self.most_usd), float(self.spent_usd))
                if not self._under_way or self.spent_usd + self._under_way + worst_usd <= self.most_usd:
                    self._under_way += worst_usd
                    return
                if cancelled.is_set():
                    raise Failed("cancelled", "cancelled while it waited for money to be left")
                self._news.wait(WAKE_S)

    def leave(self, worst_usd: Decimal, billed: Decimal) -> None:
        """One has ended, and is billed."""
        with self._news:
            self._under_way -= worst_usd
            self.spent_usd += billed
            self._news.notify_all()


@dataclass
class CappedCaller:
    """A caller under a cap, which others may share.

    What a call is billed whose reply was lost is not known: it counts with the most that it can cost, and making it
    again has to be paid for like any other call. So counts what ends in a way that nobody thought of.

    Args:
        caller: The caller.
        limit: The cap.
        worst_usd: The most that one call of a function can cost.
    """

    caller: Caller
    limit: SpendLimit
    worst_usd: Callable[[str], Decimal]

    def call(
        self,
        function: str,
        event: dict[str, Any],
        *,
        again: bool,
        cancelled: threading.Event,
        sent: threading.Event | None = None,
        more: Callable[[], bool] = always,
    ) -> Answer:
        """Have a function run an event, if that can be paid for.

        Raises:
            SpendLimitReached: It can't.
            Failed: It gave no result.
        """
        worst = self.worst_usd(function) + at_most(event).usd
        held, spent, counted = worst, worst, 0

        def paid() -> bool:
            """Whether a call whose reply was lost may be made again: that try is spent, and one more asked for."""
            nonlocal held, counted
            self.limit.leave(held, worst)
            held, counted = Decimal(), counted + 1
            if not more():
                return False
            try:
                self.limit.enter(worst, cancelled)
            except (SpendLimitReached, Failed):
                return False
            held = worst
            return True

        self.limit.enter(worst, cancelled)
        try:
            answer = self.caller.call(function, event, again=again, cancelled=cancelled, sent=sent, more=paid)
            spent = answer.billed.usd + of_answer(answer).usd + (answer.lost - counted) * worst
        except Failed as failed:
            lost = failed.lost or (failed.why == "unknown" and not failed.billed.requests)
            spent = failed.billed.usd + (lost - counted) * worst
            raise
        finally:
            self.limit.leave(held, spent)
        return answer

"""A cap is passed by one invocation at most, by any number of threads."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
from botocore.exceptions import ReadTimeoutError

from prefect_slo.aws.invoke import Answer, Failed, Invoker
from prefect_slo.aws.report import Billed
from prefect_slo.aws.spending import CappedCaller, SpendLimit
from prefect_slo.errors import SpendLimitReached
from prefect_slo.pricing import price_list


@pytest.mark.parametrize("seed", range(10))
def test_threads_together_pass_the_cap_by_one_call_at_most(seed: int) -> None:
    rng = random.Random(seed)
    worst, most = Decimal(30) / 100, Decimal(rng.randint(10, 300)) / 100
    limit, refused, billed = SpendLimit(most), [], []
    never = threading.Event()

    def spend() -> None:
        for _ in range(40):
            try:
                limit.enter(worst, never)
            except SpendLimitReached as error:
                refused.append(error)
                return
            billed.append(Decimal(rng.randint(1, 30)) / 100)
            limit.leave(worst, billed[-1])

    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 8
    assert limit.spent_usd == sum(billed)
    assert most <= limit.spent_usd < most + max(billed)


def test_what_is_under_way_counts_with_the_most_that_it_can_cost() -> None:
    limit, gone, worst = SpendLimit(Decimal(1)), threading.Event(), Decimal("0.25")
    gone.set()
    for _ in range(4):
        limit.enter(worst, gone)
    with pytest.raises(Failed, match="cancelled"):
        limit.enter(worst, gone)
    limit.leave(worst, Decimal("0.01"))
    with pytest.raises(Failed, match="cancelled"):
        limit.enter(worst, gone)
    limit.leave(worst, Decimal("0.01"))
    limit.enter(worst, gone)


def test_a_cap_that_is_reached_says_what_was_spent() -> None:
    limit = SpendLimit(Decimal("0.5"))
    limit.enter(Decimal(9), threading.Event())
    limit.leave(Decimal(9), Decimal("0.75"))
    with pytest.raises(SpendLimitReached, match=r"\$0.75 of \$0.5.*max_spend_usd"):
        limit.enter(Decimal(9), threading.Event())


@pytest.mark.parametrize(
    ("ended", "spent"),
    [
        (Failed("unknown", "its reply was lost"), "0.5"),
        (Failed("died", "exit status 3", billed=Billed(Decimal("0.01"), 100, 1)), "0.01"),
        (Failed("unknown", "its result cannot be read", billed=Billed(Decimal("0.01"), 100, 1)), "0.01"),
        (ConnectionError("a reply that nobody thought of"), "0.5"),
        (Answer({"ok": True}, 0.0, 1.0, 0.0, None, Billed(Decimal("0.01"), 100, 1), lost=2), "1.01"),
    ],
)
def test_a_call_whose_reply_was_lost_counts_with_the_most_that_it_can_cost(
    ended: Exception | Answer, spent: str
) -> None:
    class Ends:
        def call(self, *_: Any, **__: Any) -> Answer:
            if isinstance(ended, Exception):
                raise ended
            return ended

    limit = SpendLimit(Decimal(10))
    with suppress(Failed, ConnectionError):
        CappedCaller(Ends(), limit, lambda name: Decimal("0.5")).call("f", {}, again=True, cancelled=threading.Event())
    assert limit.spent_usd == Decimal(spent)


class Lost:
    """Lambda whose replies are lost; the first ones wait for each other, so that all are under way at once."""

    def __init__(self, together: int) -> None:
        self.calls, self._first, self._left = 0, threading.Barrier(together), together
        self._lock = threading.Lock()

    def invoke(self, **_: Any) -> Any:
        with self._lock:
            self.calls, self._left = self.calls + 1, self._left - 1
            first = self._left >= 0
        if first:
            self._first.wait(20)
        raise ReadTimeoutError(endpoint_url="https://lambda")


@pytest.mark.parametrize(("most", "made"), [(10, 10), (14, 14), (100, 30)])
def test_calls_that_are_made_again_are_paid_for_like_any_other(most: int, made: int) -> None:
    lambdas, limit = Lost(10), SpendLimit(Decimal(most))
    invoker = Invoker(lambdas, price_list("aws-lambda-x86"), seed=0, sleep=lambda event, seconds: False)
    capped, ends = CappedCaller(invoker, limit, lambda name: Decimal(1)), list[str]()

    def run(n: int) -> None:
        try:
            capped.call("f", {"n": n}, again=True, cancelled=threading.Event())
        except Failed as failed:
            ends.append(failed.why)

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(run, range(10)))
    assert (lambdas.calls, limit.spent_usd, ends) == (made, made, ["unknown"] * 10)

"""A cap is passed by one invocation at most, by any number of threads."""

from __future__ import annotations

import random
import threading
from decimal import Decimal

import pytest

from prefect_slo.aws.invoke import Failed
from prefect_slo.aws.spending import SpendLimit
from prefect_slo.errors import SpendLimitReached


@pytest.mark.parametrize("seed", range(10))
def test_threads_together_pass_the_cap_by_one_call_at_most(seed: int) -> None:
    rng = random.Random(seed)
    each, most = Decimal(rng.randint(1, 30)) / 100, Decimal(rng.randint(10, 300)) / 100
    limit, refused = SpendLimit(most), []
    never = threading.Event()

    def spend() -> None:
        for _ in range(40):
            try:
                limit.enter(never)
            except SpendLimitReached as error:
                refused.append(error)
                return
            limit.leave(each)

    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if refused:
        assert most <= limit.spent_usd < most + each
    else:
        assert limit.spent_usd == 320 * each < most


def test_before_one_has_ended_a_second_waits() -> None:
    limit, gone = SpendLimit(Decimal(1)), threading.Event()
    limit.enter(gone)
    gone.set()
    with pytest.raises(Failed, match="cancelled"):
        limit.enter(gone)
    limit.leave(Decimal("0.25"))
    for _ in range(3):
        limit.enter(gone)
    with pytest.raises(Failed):
        limit.enter(gone)


def test_a_cap_that_is_reached_says_what_was_spent() -> None:
    limit = SpendLimit(Decimal("0.5"))
    limit.enter(threading.Event())
    limit.leave(Decimal("0.75"))
    with pytest.raises(SpendLimitReached, match=r"\$0.75 of \$0.5.*max_spend_usd"):
        limit.enter(threading.Event())

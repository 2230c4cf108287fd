"""The choice between two exchanges: what is learned of how work ended, and that all that was tried is paid for."""

from __future__ import annotations

import errno
import pickle
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pytest

from prefect_slo.aws.delegating import Delegating
from prefect_slo.aws.exchange import Item, Order, PartsGone, Returned, TooLarge
from prefect_slo.aws.invoke import NEVER_RAN, Answer, Failed, Why
from prefect_slo.aws.report import Billed
from prefect_slo.control.delegation import LEAST_SEEN, Limits, Needs, Terms
from prefect_slo.errors import SpendLimitReached

USD, STORAGE_USD = Decimal("0.01"), Decimal("0.0003")
BILLED = Billed(USD, 1000, 1)


@dataclass
class Service:
    """Does work in the time, and to the end, that it is told; every try costs the same."""

    now: list[float]
    took_s: float = 1.0
    end: Exception | None = None
    full: tuple[int, ...] = ()
    tried: int = 0
    store: Any = field(default=None)

    def run(self, function: str, order: Order) -> Returned:
        self.tried += 1
        self.now[0] += self.took_s
        if self.end is not None:
            raise self.end
        disk = pickle.dumps((OSError(errno.ENOSPC, "full"), None))
        done = [
            Item(n, disk if n in self.full else pickle.dumps((n, None)), n in self.full, "", 0.0, 0.0, 0.0, 1.0)
            for n in order.ids
        ]
        answer = Answer({}, 0.0, 1.0, 0.0, None, BILLED, lost=1)
        return Returned(tuple(done), (), None, {"handler_s": self.took_s}, answer, STORAGE_USD)


def failed(why: Why) -> Failed:
    error = Failed(why, f"it ended by {why}", billed=BILLED)
    error.storage_usd, error.lost = STORAGE_USD, 1
    return error


def delegating(*, on_batch_s: float = 900.0) -> tuple[Delegating, Any, Any]:
    now = [0.0]
    lambdas, batch = Service(now, 10.0), Service(now, on_batch_s)
    terms = Terms(limit_s=900.0, launch_s=90.0)
    both = Delegating(
        lambdas,
        batch,
        "lambda-batch",
        Needs(),
        Limits(1024, 512, 900),
        lambda function: terms,
        clock=lambda: now[0],  # type: ignore[arg-type]
    )
    return both, lambdas, batch


def run(both: Delegating, items: int = 1) -> Returned:
    calls = [(n, b"") for n in range(items)]
    return both.run("f", Order("function", b"code", calls, ("k",)))


def test_what_lambda_wrote_and_read_is_paid_for_beside_what_batch_does() -> None:
    both, lambdas, _ = delegating()
    lambdas.end = failed("timeout")
    returned = run(both)
    assert (returned.answer.billed, returned.storage_usd) == (BILLED + BILLED, 2 * STORAGE_USD)
    assert returned.answer.lost == 2, "and what is not known of both is said"


def test_after_a_full_disk_both_are_paid_for() -> None:
    both, lambdas, _ = delegating()
    lambdas.full = (1,)
    returned = run(both, items=3)
    assert [pickle.loads(one.payload)[0] for one in returned.items] == [0, 1, 2]
    assert (returned.answer.billed, returned.storage_usd) == (BILLED + BILLED, 2 * STORAGE_USD)
    assert returned.answer.lost == 2


@pytest.mark.parametrize("end", [failed("died"), failed("start"), SpendLimitReached(1.0, 1.0)])
def test_where_batch_fails_what_met_no_full_disk_has_its_result_all_the_same(end: Exception) -> None:
    both, lambdas, batch = delegating()
    lambdas.full, batch.end = (1,), end
    returned = run(both, items=3)
    values = [pickle.loads(one.payload) for one in returned.items]
    assert [value for value, _ in values[::2]] == [0, 2]
    error, words = values[1]
    assert returned.items[1].failed
    assert error.errno == errno.ENOSPC
    assert "its temporary disk was full; then on Batch: " in words
    assert str(end).rpartition(": ")[2] in words
    tries = 2 if isinstance(end, Failed) else 1
    assert (returned.answer.billed.usd, returned.storage_usd) == (tries * USD, tries * STORAGE_USD)
    assert returned.answer.lost == tries
    assert returned.stored == (("k", "batch"),), "what the job would have read is deleted, too"


@pytest.mark.parametrize(
    ("end", "tries"),
    [
        (failed("memory"), 2),
        (SpendLimitReached(1.0, 1.0), 1),
        (TooLarge("it does not fit"), 1),
        (ConnectionError("S3 is gone"), 1),
    ],
)
def test_whatever_keeps_batch_from_it_what_lambda_took_is_paid_for(end: Exception, tries: int) -> None:
    both, lambdas, batch = delegating()
    lambdas.end, batch.end = failed("timeout"), end
    with pytest.raises(Failed) as error:
        run(both)
    assert (error.value.billed.usd, error.value.storage_usd) == (tries * USD, tries * STORAGE_USD)
    assert (error.value.billed.requests, error.value.lost) == (tries, tries)
    assert "on Lambda: it ended by timeout; then on Batch: " in error.value.detail
    assert str(end).rpartition(": ")[2] in error.value.detail
    lambdas.end = None
    batch.end = end
    assert run(both).answer.billed == BILLED, "which nothing had to be added to"


@pytest.mark.parametrize("then", sorted(NEVER_RAN))
@pytest.mark.parametrize("why", ["timeout", "memory", "disk"])
def test_what_ran_on_lambda_has_run_whatever_keeps_batch_from_it(why: Why, then: Why) -> None:
    both, lambdas, batch = delegating()
    lambdas.end, batch.end = failed(why), failed(then)
    with pytest.raises(Failed) as error:
        run(both)
    assert error.value.why == why
    lambdas.end = failed("throttled")
    with pytest.raises(Failed) as error:
        run(both)
    assert error.value.why == then, "it has run nowhere"


def test_what_batch_does_not_find_any_more_is_told_as_that_where_lambda_ran_nothing() -> None:
    both, lambdas, batch = delegating()
    gone = PartsGone(("shared/1/args",), "not on S3 any more", BILLED)
    gone.storage_usd, gone.lost, gone.again = STORAGE_USD, 1, True
    lambdas.end, batch.end = failed("throttled"), gone
    with pytest.raises(PartsGone) as told:
        run(both)
    assert (told.value.keys, told.value.again, told.value.why) == (gone.keys, True, "died")
    assert (told.value.billed, told.value.storage_usd) == (BILLED + BILLED, 2 * STORAGE_USD)
    assert told.value.lost == 2
    lambdas.end = failed("timeout")
    with pytest.raises(Failed) as ran:
        run(both)
    assert not isinstance(ran.value, PartsGone), "on Lambda it has run"


def test_one_in_a_hundred_that_overruns_stays_one_in_a_hundred() -> None:
    """However long a run goes on: 890 s too much for 1 % are less than 90 s for everyone."""
    both, lambdas, batch = delegating()
    for n in range(5000):
        lambdas.end, lambdas.took_s = (failed("timeout"), 900.0) if n % 100 == 99 else (None, 10.0)
        run(both)
    assert lambdas.tried == 5000
    assert batch.tried == 50


def test_what_runs_out_of_memory_each_time_is_not_tried_for_ever() -> None:
    both, lambdas, batch = delegating()
    lambdas.end, lambdas.took_s = failed("memory"), 2.0
    for _ in range(2 * LEAST_SEEN):
        run(both)
    assert lambdas.tried == LEAST_SEEN
    assert batch.tried == 2 * LEAST_SEEN


def test_running_out_of_memory_costs_what_it_took_and_not_the_limit() -> None:
    """Every other call is lost after 2 s: a try is worth it, which it would not be for 900 s."""
    both, lambdas, _ = delegating(on_batch_s=30.0)
    for n in range(40):
        lambdas.end, lambdas.took_s = (failed("memory"), 2.0) if n % 2 else (None, 10.0)
        run(both)
    assert lambdas.tried == 40

"""Results that stay elsewhere: brought once, whatever that raises."""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Iterator
from contextvars import copy_context
from dataclasses import dataclass, field
from decimal import Decimal
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

import pytest
from prefect import task
from prefect.results import ResultRecordMetadata
from prefect.states import Completed

from prefect_slo.errors import ResultLost, Unpicklable
from prefect_slo.runner.calls import Call
from prefect_slo.runner.deposits import Deposit, Deposits, KeptRecord, plain_record
from prefect_slo.runner.supplies import Supplies
from prefect_slo.runner.variants import Variants

PATIENCE_S = 60.0


@dataclass(eq=False)
class Lying:
    """A part in memory, which raises what it is told before it is handed out."""

    data: bytes
    stumbles: list[BaseException] = field(default_factory=list)
    lost: str = ""
    place: object = None
    asked: int = 0
    fetch_usd: Decimal = Decimal()

    @property
    def size(self) -> int:
        return len(self.data)

    def gone(self) -> str:
        return self.lost

    def fetch(self) -> bytes:
        self.asked += 1
        if self.stumbles:
            raise self.stumbles.pop(0)
        return self.data


class Quits:
    """Ends whoever unpickles it."""

    def __reduce__(self) -> Any:
        return sys.exit, (3,)


def deposit(part: Lying, deposits: Deposits | None = None) -> Deposit:
    made = Deposit(part)
    (Deposits() if deposits is None else deposits).add(made, "make", lambda value, usd: None)
    return made


@task
def take(record: Any) -> None: ...


@dataclass
class Supplied:
    """Supplies, and what is heard of them."""

    deposits: Deposits
    looks: SimpleQueue[tuple[int, BaseException | None]]
    home: threading.Event
    supplies: Supplies

    def fetched(self, *parts: Lying) -> list[BaseException | None]:
        """What comes of an item for each part, ordered in turn."""
        found = []
        for item, part in enumerate(parts):
            one = deposit(part, self.deposits)
            record = KeptRecord.of(one, ResultRecordMetadata(), persisted=False)
            variant, context = Variants().of(take), copy_context()
            made = Call(item, "take", take, variant, uuid4(), {"x": [record]}, None, None, context, frozenset())
            made.has_inputs = True
            self.supplies.order(item, self.supplies.lacking(made, "elsewhere"))
            found.append(self.looks.get(timeout=PATIENCE_S)[1])
        return found


@pytest.fixture
def supplied() -> Iterator[Supplied]:
    deposits, looks, home = Deposits(), SimpleQueue[tuple[int, BaseException | None]](), threading.Event()
    supplies = Supplies(
        deposits,
        lambda deposit: None,
        look=lambda item, error: looks.put((item, error)),
        home=home.set,
        context=copy_context(),
    )
    yield Supplied(deposits, looks, home, supplies)
    supplies.close()


def test_an_item_hears_of_whatever_its_fetch_raises_and_others_are_still_fetched(supplied):
    quits, stopped = Lying(pickle.dumps(Quits())), Lying(b"", [KeyboardInterrupt("stop")])
    first, second, third = supplied.fetched(quits, stopped, Lying(pickle.dumps(5)))
    assert isinstance(first, Unpicklable)
    assert "SystemExit: 3" in str(first)
    assert isinstance(second, KeyboardInterrupt)
    assert third is None


def test_a_place_that_stumbles_once_has_lost_nothing():
    again: list[Deposit] = []
    part = Lying(pickle.dumps(5), [OSError("the line broke")])
    assert deposit(part, Deposits(lambda one: bool(again.append(one)))).value() == 5
    assert not again
    assert part.asked == 2


@pytest.mark.parametrize(
    ("part", "asked"),
    [
        (Lying(b"", [LookupError("the worker that kept it is gone")]), 1),
        (Lying(b"", [OSError("reset")], lost="the worker that kept it is gone"), 1),
        (Lying(b"", [OSError("reset"), OSError("still so")]), 2),
    ],
    ids=["said to be lost", "known to be lost", "stumbles again"],
)
def test_what_is_lost_is_not_asked_for_again_and_again(part: Lying, asked: int):
    with pytest.raises(ResultLost):
        deposit(part).value()
    assert part.asked == asked


def test_a_run_ends_whatever_bringing_home_raises(supplied):
    parts = [Lying(b"", [KeyboardInterrupt("stop")]), Lying(pickle.dumps(Quits())), Lying(pickle.dumps(5))]
    held = [deposit(part, supplied.deposits) for part in parts]
    assert not supplied.supplies.all_here()
    assert supplied.home.wait(PATIENCE_S)
    assert supplied.supplies.all_here()
    assert [part.asked for part in parts] == [1, 1, 1]
    assert held[2].value() == 5


def test_nothing_is_brought_home_where_the_flow_has_failed():
    deposits, part = Deposits(), Lying(pickle.dumps(5))
    held = deposit(part, deposits)
    deposits.close(bring=False, why="its flow run failed")
    with pytest.raises(ResultLost, match="its flow run failed"):
        held.value()
    assert part.asked == 0


@pytest.mark.parametrize("stays", [True, False])
def test_a_fetch_is_paid_for_as_the_one_that_was_made(stays: bool):
    """A result that is made again may be of another size, or come with its call."""
    usd, another = Decimal("0.01"), Decimal("0.02")
    paid: list[Decimal] = []
    part = Lying(pickle.dumps(5), [LookupError("gone")], fetch_usd=usd)
    lost = Deposit(part)
    Deposits().add(lost, "make", lambda value, cost: paid.append(cost))
    with pytest.raises(ResultLost):
        lost.value()
    metadata = ResultRecordMetadata()
    anew = KeptRecord.of(deposit(Lying(pickle.dumps(6), fetch_usd=another)), metadata, persisted=False)
    assert lost.renew(Completed(data=anew if stays else plain_record(6, metadata, persisted=False)))
    assert lost.value() == 6
    assert paid == [another if stays else Decimal()]


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_results_may_come_in_while_those_that_are_there_are_brought(restless, monkeypatch):
    monkeypatch.setattr("prefect_slo.runner.deposits.gc.collect", int)  # it would take most of the time
    deposits, data = Deposits(), pickle.dumps(5)
    held = [deposit(Lying(data), deposits) for _ in range(1_000)]
    adding = threading.Thread(target=lambda: held.extend(deposit(Lying(data), deposits) for _ in range(5_000)))
    adding.start()
    while adding.is_alive():
        deposits.bring()
    adding.join()
    deposits.bring()
    assert len(held) == 6_000, "none was refused"
    assert not [one for one in held if not one.goes_to("elsewhere")]

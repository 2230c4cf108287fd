"""Virtual time."""

from __future__ import annotations

import doctest

import pytest

from prefect_slo.errors import InvalidValue
from prefect_slo.testing import FakeClock, clock


def test_the_example_holds() -> None:
    assert doctest.testmod(clock).failed == 0


def test_what_is_due_is_called_in_order_and_at_its_own_time() -> None:
    fake, heard = FakeClock(100.0), []
    fake.call_later(2, lambda: heard.append(("b", fake.now)))
    fake.call_later(1, lambda: heard.append(("a", fake.now)))
    fake.call_later(2, lambda: heard.append(("c", fake.now)))
    fake.advance(1.5)
    assert heard == [("a", 101.0)]
    assert fake.now == 101.5
    fake.advance(10)
    assert heard == [("a", 101.0), ("b", 102.0), ("c", 102.0)]


def test_what_is_asked_for_on_the_way_happens_on_the_way() -> None:
    fake, heard = FakeClock(), []
    fake.call_later(1, lambda: fake.call_later(1, lambda: heard.append(fake.now)))
    fake.advance(5)
    assert heard == [2.0]
    assert not fake.step()


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_it_does_not_go_back(seconds: float) -> None:
    with pytest.raises(InvalidValue):
        FakeClock().advance(seconds)
    with pytest.raises(InvalidValue):
        FakeClock().call_later(seconds, lambda: None)

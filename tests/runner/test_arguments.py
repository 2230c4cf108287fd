"""Arguments for workers without Prefect: large ones go beside the rest, and arrive as what they were."""

from __future__ import annotations

import io
import weakref
from decimal import Decimal
from typing import Any

import pytest

from prefect_slo.aws import worker
from prefect_slo.runner.arguments import APART_BYTES, Parts, dump_arguments
from prefect_slo.runner.elsewhere import Elsewhere

LARGE = 2 * APART_BYTES


class Lying:
    """A part that lies elsewhere."""

    place, size, fetch_usd = None, LARGE, Decimal()

    def gone(self) -> str:
        return ""

    def fetch(self) -> bytes:
        raise AssertionError("nobody brings it here")


def sent(parts: Parts, *args: Any, **kwargs: Any) -> bytes:
    return dump_arguments(args, kwargs, parts)


def arrived(pickled: bytes, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Positional arguments as a worker loads them; what lies elsewhere is the list ``[1]`` there."""
    here = [part if isinstance(part, bytes) else worker.pickle.dumps([1]) for part in parts.all]
    monkeypatch.setitem(worker._STATE, "parts", here)
    args, kwargs = worker._Unpickler(io.BytesIO(pickled)).load()
    return (*args, *kwargs.values())


def test_a_large_value_goes_beside_the_arguments_of_all_calls_that_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, table = Parts(), bytearray(LARGE)
    calls = [sent(parts, number, table=table) for number in range(3)]
    assert len(parts.all) == 1
    assert all(len(call) < 1000 for call in calls)
    assert [arrived(call, parts, monkeypatch) for call in calls] == [(number, table) for number in range(3)]


def test_what_is_small_goes_along() -> None:
    parts = Parts()
    sent(parts, 1, [2, 3], text="four")
    assert parts.all == []


def test_equal_values_travel_once_and_stay_two(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts()
    one, other = arrived(sent(parts, bytearray(LARGE), bytearray(LARGE)), parts, monkeypatch)
    assert len(parts.all) == 1
    one[0] = 9
    assert other[0] == 0


def test_a_value_that_is_named_twice_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, table, kept = Parts(), bytearray(LARGE), Elsewhere(Lying())
    one, other, again, lying = arrived(sent(parts, table, kept, again=table, more=[kept]), parts, monkeypatch)
    assert again is one
    assert lying[0] is other


def test_what_large_values_have_in_common_stays_common(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, table = Parts(), bytearray(LARGE)
    one, both = arrived(sent(parts, table, [table, 5]), parts, monkeypatch)
    assert both[0] is one


def test_what_stands_for_a_value_can_be_seen_to_be_gone() -> None:
    """Prefect links results by their ids: whoever comes to lie there next must not inherit the link."""
    stands = Elsewhere(Lying())
    seen = weakref.ref(stands)
    del stands
    assert seen() is None

"""Arguments for workers without Prefect: large ones go beside the rest, and arrive as what they were."""

from __future__ import annotations

import io
import random
import weakref
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from prefect_slo.aws import worker
from prefect_slo.runner.arguments import APART_BYTES, Parts, dump_arguments
from prefect_slo.runner.backends.protocol import Apart
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
    here = [part.content if isinstance(part, Apart) else worker.pickle.dumps([1]) for part in parts.all]
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


class Model:
    """Two layers, the last of which is small."""

    def __init__(self) -> None:
        self.body, self.head = bytearray(LARGE), [1.0]

    @property
    def bias(self) -> float:
        return self.head[0]


@dataclass
class Row:
    """Travels by value, with all that the standard library has made for it."""

    table: bytearray
    tags: list[str] = field(default_factory=list)
    weight: float = 1.0


def test_a_small_value_that_is_part_of_a_large_one_stays_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, head = Parts(), [1.0]
    table, tiny = arrived(sent(parts, [bytearray(LARGE), head], head), parts, monkeypatch)
    assert table[1] is tiny
    model = Model()
    model, layers = arrived(sent(parts, model, layers={"head": model.head}), parts, monkeypatch)
    assert layers["head"] is model.head
    assert parts.all == [], "what goes beside them would be sent for nothing"


def test_values_that_draw_from_one_generator_go_on_doing_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for rng in (random.Random(1), np.random.default_rng(1)):
        parts = Parts()
        world, agents, seed = arrived(
            sent(parts, (bytearray(LARGE), rng), (bytearray(b"x" * LARGE), rng), 7), parts, monkeypatch
        )
        assert world[1] is agents[1]
        assert seed == 7


def test_values_of_classes_that_draw_from_one_generator_go_on_doing_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """However their classes come by it: these travel by value, with what their methods refer to."""
    rng = random.Random(1)

    class World:
        def __init__(self) -> None:
            self.table, self.rng = bytearray(LARGE), rng

    class Agent:
        def __init__(self) -> None:
            self.rng = rng

    parts = Parts()
    world, agents = arrived(sent(parts, World(), [Agent(), Agent()]), parts, monkeypatch)
    assert world.rng is agents[0].rng is agents[1].rng


def test_what_small_values_share_with_a_large_one_they_share_beside_what_lies_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts, head, kept = Parts(), [1.0], Elsewhere(Lying())
    table, tiny, lying = arrived(sent(parts, [bytearray(LARGE), head], head, kept), parts, monkeypatch)
    assert table[1] is tiny
    assert (lying, len(parts.all)) == ([1], 1)


def test_what_never_changes_may_be_in_several_values() -> None:
    """Types, and what arrays and tables are described by: two copies of these are as good as one."""
    for one, other in (
        (np.zeros(LARGE // 8), np.ones(3)),
        (np.zeros(LARGE // 8), [np.float64(1), np.ones(LARGE // 8)]),
        ([Model(), "name", ("a", 1)], {"model": Model, "name": "name"}),
        ([bytearray(LARGE), arrived], arrived),
        (Row(bytearray(LARGE)), [Row(bytearray(1))]),
        ([bytearray(LARGE), Decimal(1)], Decimal(1)),
    ):
        parts = Parts()
        assert len(sent(parts, one, other=other)) < APART_BYTES
        assert parts.all


def test_calls_under_way_have_one_copy_of_what_they_all_take() -> None:
    calls = [Parts() for _ in range(3)]
    for number, parts in enumerate(calls):
        sent(parts, number, bytearray(LARGE))
    [value] = {id(parts.all[0]): parts.all[0] for parts in calls}.values()
    seen = weakref.ref(value)
    del value, parts
    assert seen() is not None
    calls.clear()
    assert seen() is None, "nor is it held any longer"


class Counted(bytearray):
    """Counts how often it is pickled."""

    times = 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        type(self).times += 1
        return bytearray, (bytes(self),)


def test_one_large_value_is_pickled_once_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "times", 0)
    parts, table = Parts(), Counted(LARGE)
    calls = [sent(parts, number, table) for number in range(3)]
    assert (Counted.times, len(parts.all)) == (3, 1)
    assert [arrived(call, parts, monkeypatch) for call in calls] == [(number, bytearray(LARGE)) for number in range(3)]


def test_several_large_values_are_each_pickled_once_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "times", 0)
    parts = Parts()
    call = sent(parts, Counted(LARGE), Counted(2 * LARGE), 3)
    assert (Counted.times, len(parts.all)) == (2, 2)
    assert arrived(call, parts, monkeypatch) == (bytearray(LARGE), bytearray(2 * LARGE), 3)


def test_large_texts_that_several_values_hold_travel_once() -> None:
    """Two copies of them would be as good as one, but for their size."""
    parts, text = Parts(), "x" * LARGE
    rest = sent(parts, [text] * (APART_BYTES // 8), [text] * (APART_BYTES // 8))
    assert not parts.all
    assert len(rest) < 2 * LARGE


def test_what_only_looks_large_goes_along_and_what_does_not_look_so_goes_beside() -> None:
    parts = Parts()
    sent(parts, [None] * LARGE)
    assert len(parts.all) == 1
    sent(parts, [None] * (APART_BYTES // 8))
    assert len(parts.all) == 1
    sent(parts, [{"deep": [bytearray(LARGE)]}])
    assert len(parts.all) == 2
    rest = sent(parts, bytearray(b"x" * LARGE), {"deep": bytearray(b"y" * LARGE)})
    assert (len(parts.all), len(rest) < 1000) == (4, True)


def test_what_stands_for_a_value_can_be_seen_to_be_gone() -> None:
    """Prefect links results by their ids: whoever comes to lie there next must not inherit the link."""
    stands = Elsewhere(Lying())
    seen = weakref.ref(stands)
    del stands
    assert seen() is None

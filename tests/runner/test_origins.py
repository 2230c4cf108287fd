"""What is held of a call so that its result can be made again."""

from __future__ import annotations

import gc
from contextvars import copy_context
from typing import Any
from uuid import uuid4

import pytest
from prefect import task
from prefect.states import Completed

from prefect_slo.runner import origins
from prefect_slo.runner.calls import Call, FinalState
from prefect_slo.runner.futures import Callbacks, CallFuture
from prefect_slo.runner.origins import Origins
from prefect_slo.runner.variants import Variants


@task
def add(x: Any, more: Any = 0) -> Any:
    return x


def call(parameters: dict[str, Any], *, wait_for: list[Any] | None = None) -> Call:
    made = Call(1, "add", add, Variants().of(add), uuid4(), parameters, wait_for, None, copy_context(), frozenset())
    made.has_inputs = True
    return made


def future() -> CallFuture:
    final = FinalState()
    final.set_result(Completed(data=3))
    return CallFuture(uuid4(), final, Callbacks())


def test_a_call_runs_again_as_it_ran_while_what_it_takes_is_held():
    upstream, state = future(), Completed(data=3)
    first = call({"x": [upstream, 5], "more": {"state": state}}, wait_for=[upstream])
    again = Origins().of(first).again(7)
    assert (again.item, again.task_run_id, again.stage) == (7, first.task_run_id, "add")
    assert again.parameters["x"] == [upstream, 5]
    assert again.parameters["more"]["state"] is state
    assert again.wait_for == [upstream]
    assert again.future is not first.future


def test_what_the_flow_has_let_go_of_is_not_held_and_what_was_only_waited_for_is_not_missed():
    upstream = future()
    origin, waited = Origins().of(call({"x": upstream})), Origins().of(call({"x": 1}, wait_for=[upstream]))
    del upstream
    gc.collect()
    assert origin.again(7) is None
    assert waited.again(7).parameters == {"x": 1}


def test_a_call_runs_again_with_what_was_sent_whatever_the_flow_has_made_of_it_since():
    upstream, sent = future(), {"rows": [1, 2]}
    origin = Origins().of(call({"x": [upstream, sent], "more": 3}))
    sent["rows"].append(3)
    again = origin.again(7)
    assert again.parameters == {"x": [upstream, {"rows": [1, 2]}], "more": 3}
    again.parameters["x"].clear()
    assert origin.again(8).parameters["x"] == [upstream, {"rows": [1, 2]}]


def test_arguments_that_cannot_be_held_as_they_are_sent_make_nothing_again():
    assert Origins().of(call({"x": (one for one in ())})) is None


class Counted:
    """Counts how often it is pickled, with 1000 bytes each time."""

    times = 0

    def __reduce__(self) -> Any:
        type(self).times += 1
        return bytes, (b"x" * 1000,)


@pytest.mark.parametrize(("room", "fit"), [(2500, 2), (999, 0)])
def test_an_argument_that_many_calls_take_is_not_pickled_again_where_there_is_no_room_for_it(
    monkeypatch: pytest.MonkeyPatch, room: int, fit: int
):
    monkeypatch.setattr(origins, "ROOM_BYTES", room)
    monkeypatch.setattr(origins, "NOTED_BYTES", 100)
    monkeypatch.setattr(Counted, "times", 0)
    kept, table = Origins(), {"rows": [Counted()]}
    held = [kept.of(call({"x": n, "more": table})) for n in range(20)]
    assert sum(origin is not None for origin in held) == fit
    assert Counted.times == max(fit, 1)
    assert [origin.again(7).parameters["more"] for origin in held if origin] == [{"rows": [b"x" * 1000]}] * fit
    del held
    assert (kept.of(call({"x": 0, "more": table})) is not None) == bool(fit), "there is room again"


def test_what_arguments_have_in_common_they_have_in_common_again():
    shared = [1]
    again = Origins().of(call({"x": {"a": shared}, "more": (shared,)})).again(7)
    assert again.parameters["more"][0] is again.parameters["x"]["a"]


def test_no_more_arguments_are_held_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(origins, "ROOM_BYTES", 2500)
    kept = Origins()
    first, second = kept.of(call({"x": bytes(1000)})), kept.of(call({"x": [bytes(1000)]}))
    assert first is not None
    assert second is not None
    for more in (bytes(1000), "x" * 1000, [bytes(1000)], [[3] * 1000]):
        assert kept.of(call({"x": more})) is None
    del first
    assert kept.of(call({"x": [bytes(1000)]})) is not None

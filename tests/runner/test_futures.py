"""Callbacks of futures: in order, in their own context, and never in the way of what they may wait for."""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar

import cloudpickle
import pytest
from prefect.futures import as_completed, wait
from prefect.states import Completed, Failed

from prefect_slo.runner.futures import Callbacks, CallFuture, RaisedFuture
from prefect_slo.runner.ids import uuid7
from prefect_slo.runner.parcels import futures_to_states

PATIENCE_S = 30.0


def future(callbacks: Callbacks) -> tuple[Future[object], CallFuture]:
    wrapped: Future[object] = Future()
    return wrapped, CallFuture(uuid7(), wrapped, callbacks)


def run_all(jobs: list[Callable[[Callbacks], None]]) -> None:
    """Runs callbacks to the last one's end; the first waits until all are there."""
    over, all_there = threading.Event(), threading.Event()
    callbacks = Callbacks(idle=over.set)
    callbacks.add(lambda: all_there.wait(PATIENCE_S) and None)
    for job in jobs:
        callbacks.add(lambda job=job: job(callbacks))
    all_there.set()
    assert over.wait(PATIENCE_S)
    assert callbacks.outstanding == 0


def test_callbacks_run_one_after_another_in_order() -> None:
    seen: list[int] = []
    run_all([lambda _, n=n: seen.append(n) for n in range(500)])
    assert seen == list(range(500))


def test_a_callback_may_wait_for_one_behind_it() -> None:
    rung = [threading.Event() for _ in range(3)]
    kept: list[bool] = []

    def wait_for(n: int) -> Callable[[Callbacks], None]:
        def job(_: Callbacks) -> None:
            rung[n].set()
            if n < 2:
                kept.append(rung[n + 1].wait(PATIENCE_S))

        return job

    run_all([wait_for(0), wait_for(1), wait_for(2)])
    assert kept == [True, True]


def test_a_callback_that_raises_holds_up_nothing() -> None:
    seen: list[int] = []
    run_all([lambda _: 1 / 0, lambda _: seen.append(1)])  # type: ignore[list-item,func-returns-value]
    assert seen == [1]


def test_completing_a_future_does_not_wait_for_its_callbacks() -> None:
    over, release = threading.Event(), threading.Event()
    wrapped, mine = future(Callbacks(idle=over.set))
    mine.add_done_callback(lambda _: release.wait(PATIENCE_S) and None)
    wrapped.set_result(Completed(data=1))
    mine.wait(0)
    assert mine.state.is_completed()
    assert list(as_completed([mine])) == [mine]
    assert wait([mine]).done == {mine}
    assert not over.is_set()
    release.set()
    assert over.wait(PATIENCE_S)


def test_a_callback_runs_in_the_context_that_it_was_added_in() -> None:
    which: ContextVar[str] = ContextVar("which", default="none")
    seen: list[str] = []
    over = threading.Event()
    wrapped, mine = future(Callbacks(idle=over.set))
    which.set("mine")
    mine.add_done_callback(lambda _: seen.append(which.get()))
    which.set("later")
    wrapped.set_result(Completed())
    assert over.wait(PATIENCE_S)
    assert seen == ["mine"]


def test_a_callback_of_a_future_that_is_done_runs_at_once() -> None:
    wrapped, mine = future(Callbacks())
    wrapped.set_result(Completed())
    seen: list[object] = []
    mine.add_done_callback(seen.append)
    assert seen == [mine]


def test_what_stands_for_a_raised_upstream_raises_the_same_elsewhere() -> None:
    there = cloudpickle.loads(cloudpickle.dumps(RaisedFuture(uuid7(), SystemExit(3))))
    for ask in (there.wait, there.result):
        with pytest.raises(SystemExit):
            ask()


class Missing(LookupError):
    def __init__(self, name: str) -> None:
        super().__init__(f"no {name}")


@pytest.mark.parametrize("isolated", [False, True])
def test_what_failed_on_threads_says_the_same_where_processes_take_it(isolated: bool) -> None:
    error = Missing("thing")
    wrapped, mine = future(Callbacks())
    wrapped.set_result(Failed(data=error))
    try:
        state = futures_to_states(mine, isolated=isolated)
        assert state.data is error
        assert (Missing in copyreg.dispatch_table) is isolated
        if isolated:
            assert str(cloudpickle.loads(cloudpickle.dumps(state)).data) == "no thing"
    finally:
        copyreg.dispatch_table.pop(Missing, None)

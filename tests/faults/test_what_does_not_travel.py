"""Exceptions, arguments and results that do not pickle."""

from __future__ import annotations

import threading

import pytest
from prefect import allow_failure, flow, task

from prefect_slo.errors import Unpicklable
from prefect_slo.runner import flow_run
from prefect_slo.runner.task_runner import SLOTaskRunner


class Demanding(Exception):
    """Pickles, and then does not unpickle by itself: its constructor wants two arguments."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        super().__init__(f"{code}: {text}")


class Missing(LookupError):
    """Unpickles without an error, and says other words then: makes its message of its one argument."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no {name}")


class Coded(Exception):
    """Unpickles without an error, and cannot say itself then."""

    __slots__ = ("code",)

    def __init__(self, code: int = 0, *, why: str = "") -> None:
        if why:
            self.code = code
        super().__init__()

    def __str__(self) -> str:
        return f"code {self.code}"


class Locked(Exception):
    """Never pickles."""

    def __init__(self, words: str) -> None:
        self.lock = threading.Lock()
        super().__init__(words)


@task
def raises(kind: str) -> None:
    if kind == "plain":
        raise LookupError("plain words")
    if kind == "locked":
        raise Locked("locked words")
    if kind == "missing":
        raise Missing("thing")
    if kind == "coded":
        raise Coded(7, why="odd")
    raise Demanding(7, "odd words")


@flow
def failing(kind: str):
    future = raises.submit(kind)
    future.wait()
    error = future.state.result(raise_on_failure=False)
    what = "Demanding with its code" if isinstance(error, Demanding) and error.code == 7 else type(error).__name__
    return future.state.name, future.state.message, str(error), what


@pytest.mark.parametrize(
    ("kind", "words", "what"),
    [
        ("plain", "plain words", "LookupError"),
        ("odd", "7: odd words", "Demanding with its code"),
        ("locked", "locked words", "RuntimeError"),
        ("coded", "code 7", "RuntimeError"),
    ],
)
def test_an_exception_comes_back_in_the_state_as_what_it_is_where_anything_travels(
    run_isolated, recorded, kind, words, what
):
    state = run_isolated(failing, kind)
    name, message, data, came = state.result()
    assert name == "Failed"
    assert words in message
    assert words in data
    assert came == what
    assert recorded(state.state_details.flow_run_id, 1) == {("raises", "Failed"): 1}


@task
def after(x: int) -> int:
    return x


@flow
def goes_on():
    return after.submit(1, wait_for=[allow_failure(raises.submit("odd"))]).result()


def test_what_waits_for_such_an_exception_runs_on_worker_processes_all_the_same(run_isolated, notices):
    assert run_isolated(goes_on, runner=SLOTaskRunner(max_workers=2)).is_completed()
    assert not notices


@task
def seen(error: object) -> str:
    return f"{type(error).__name__}: {error}"


@flow
def looks(kinds: list[str]):
    raised = [raises.submit(kind) for kind in kinds]
    there = [seen.submit(allow_failure(future)).result() for future in raised]
    return [seen.fn(future.state.result(raise_on_failure=False)) for future in raised], there


def test_an_exception_that_came_from_one_worker_goes_on_to_another(run_isolated, notices):
    came, there = run_isolated(looks, ["odd", "missing"]).result()
    assert came == there == ["Demanding: 7: odd words", "Missing: no thing"]
    assert notices == []


@task
def locked(lock: object, x: int) -> bool:
    with lock:
        return x > 0


@task
def makes_a_lock(x: int) -> object:
    return threading.Lock()


@flow
def takes_locks(n: int):
    lock = threading.Lock()
    return [future.result() for future in [locked.submit(lock, i) for i in range(n)]]


@flow
def makes_locks(n: int):
    return [type(lock).__name__ for lock in makes_a_lock.map(range(n)).result()]


@pytest.fixture
def notices(monkeypatch) -> list[str]:
    """What the runner has told the user."""
    said: list[str] = []
    monkeypatch.setattr(flow_run, "_log", said.append)
    return said


def test_an_argument_that_does_not_pickle_moves_its_stage_to_threads_with_one_notice(run_isolated, recorded, notices):
    state = run_isolated(takes_locks, 5, runner=SLOTaskRunner())
    assert state.result() == [False, True, True, True, True]
    assert len(notices) == 1
    assert "threads" in notices[0]
    assert recorded(state.state_details.flow_run_id, 5) == {("locked", "Completed"): 5}


def test_a_result_that_does_not_pickle_moves_its_stage_to_threads_with_one_notice(run_isolated, notices):
    assert run_isolated(makes_locks, 5, runner=SLOTaskRunner()).result() == ["lock"] * 5
    assert len(notices) == 1


@flow
def pinned(kind: str):
    future = locked.submit(threading.Lock(), 1) if kind == "argument" else makes_a_lock.submit(1)
    future.wait()
    return future.state.name, future.state.data


@pytest.mark.parametrize("kind", ["argument", "result"])
def test_a_pinned_stage_says_what_does_not_pickle(run_isolated, kind):
    name, error = run_isolated(pinned, kind).result()
    assert (name, type(error)) == ("Crashed", Unpicklable)
    assert error.what == kind

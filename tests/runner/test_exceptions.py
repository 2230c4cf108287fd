"""Exceptions travel as what they are, and as plain ones of the same words where they can't."""

from __future__ import annotations

import copyreg
import pickle
import threading
from typing import Any

import cloudpickle
import pytest

from prefect_slo.aws import worker
from prefect_slo.runner.exceptions import portable


class Refused(Exception):
    """The usual way to write one: its constructor takes what its message is made of."""

    def __init__(self, number: int, why: str) -> None:
        self.number, self.why = number, why
        super().__init__(f"{number}: {why}")


class Moved(OSError):
    """Keeps its words where only the constructor of its base can put them."""

    def __init__(self, path: str, to: str) -> None:
        super().__init__(2, f"moved to {to}", path)


class Holding(Refused):
    """Has an attribute that never pickles."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(number, why)
        self.lock = threading.Lock()


def locally(error: Exception) -> Any:
    return pickle.loads(cloudpickle.dumps(portable(error)))


def on_lambda(error: Exception) -> Any:
    return pickle.loads(worker._raised(cloudpickle, error))[0]


@pytest.fixture(autouse=True)
def untaught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pickle is taught here is forgotten."""
    before = dict(copyreg.dispatch_table)
    yield
    copyreg.dispatch_table.clear()
    copyreg.dispatch_table.update(before)


@pytest.mark.parametrize("travelled", [locally, on_lambda])
def test_a_constructor_with_arguments_of_its_own_is_no_reason_to_arrive_as_something_else(travelled) -> None:
    error = Refused(7, "too late")
    error.add_note("seen on Monday")
    again = travelled(error)
    assert type(again) is Refused
    assert (str(again), again.number, again.why) == ("7: too late", 7, "too late")
    assert again.__notes__ == ["seen on Monday"]


@pytest.mark.parametrize("travelled", [locally, on_lambda])
@pytest.mark.parametrize("error", [Moved("a", "b"), Holding(7, "too late")], ids=lambda error: type(error).__name__)
def test_one_that_would_lose_its_words_or_never_pickles_is_told_in_words(travelled, error) -> None:
    again = travelled(error)
    assert type(again) is RuntimeError
    assert str(again) == f"{type(error).__name__}: {error}"
    assert type(error) not in copyreg.dispatch_table


def test_one_that_travels_by_itself_is_left_alone() -> None:
    error = ValueError("plain")
    assert portable(error) is error
    assert ValueError not in copyreg.dispatch_table

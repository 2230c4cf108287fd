"""Exceptions travel as what they are, and as plain ones of the same words where they can't."""

from __future__ import annotations

import copy
import copyreg
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest

from prefect_slo.aws import worker
from prefect_slo.aws.exchange import Item
from prefect_slo.runner.arguments import Parts, dump_arguments
from prefect_slo.runner.backends.aws_replies import carried
from prefect_slo.runner.exceptions import portable


class Refused(Exception):
    """The usual way to write one: its constructor takes what its message is made of."""

    def __init__(self, number: int, why: str) -> None:
        self.number, self.why = number, why
        super().__init__(f"{number}: {why}")


class Missing(LookupError):
    """Makes its message of its one argument: of the message, too."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no {name}")


class Coded(Exception):
    """Loses what its words are made of, without a word."""

    __slots__ = ("code",)

    def __init__(self, code: int = 0, *, why: str = "") -> None:
        if why:
            self.code = code
        super().__init__()

    def __str__(self) -> str:
        return f"code {self.code}"


class Moved(OSError):
    """Keeps its words where only the constructor of its base can put them."""

    def __init__(self, path: str, to: str) -> None:
        super().__init__(2, f"moved to {to}", path)


class Anything:
    """Its words hold its address."""


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
def untaught() -> Iterator[None]:
    """What pickle was taught about exceptions, as Dask does on import, and what it is taught here is forgotten."""
    before = dict(copyreg.dispatch_table)
    for kind in before:
        if isinstance(kind, type) and issubclass(kind, BaseException):
            del copyreg.dispatch_table[kind]
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
def test_a_message_made_of_one_argument_is_not_made_twice(travelled) -> None:
    again = travelled(Missing("thing"))
    assert (type(again), str(again)) == (Missing, "no thing")


@pytest.mark.parametrize("travelled", [locally, on_lambda])
def test_one_whose_words_change_from_copy_to_copy_keeps_its_class(travelled) -> None:
    again = travelled(KeyError(Anything()))
    assert type(again) is KeyError
    assert isinstance(again.args[0], Anything)
    assert KeyError not in copyreg.dispatch_table


@pytest.mark.parametrize("travelled", [locally, on_lambda])
def test_one_that_cannot_say_itself_is_told_by_its_class(travelled) -> None:
    again = travelled(Coded())
    assert (type(again), str(again)) == (RuntimeError, "Coded")


@pytest.mark.parametrize("travelled", [locally, on_lambda])
@pytest.mark.parametrize(
    "error",
    [Moved("a", "b"), Holding(7, "too late"), Coded(7, why="too late")],
    ids=lambda error: type(error).__name__,
)
def test_one_that_would_lose_its_words_or_never_pickles_is_told_in_words(travelled, error) -> None:
    again = travelled(error)
    assert type(again) is RuntimeError
    assert str(again) == f"{type(error).__name__}: {error}"
    assert type(error) not in copyreg.dispatch_table


def test_one_that_travels_by_itself_is_left_alone() -> None:
    error = ValueError("plain")
    assert portable(error) is error
    assert ValueError not in copyreg.dispatch_table


CLASSES = """
class Refused(Exception):
    def __init__(self, number, why):
        super().__init__(f"{number}: {why}")

class Missing(LookupError):
    def __init__(self, name):
        super().__init__(f"no {name}")
"""
FROM_A_WORKER = """
from prefect_slo.runner.exceptions import portable
sent = cloudpickle.dumps(portable(error))
"""
FROM_LAMBDA = """
from prefect_slo.aws import worker
sent = worker._raised(cloudpickle, error)
"""
TO_A_WORKER = """
error = pickle.loads(sys.stdin.buffer.read())
error = pickle.loads(pickle.dumps(copy.deepcopy(error)))  # and on it goes
"""
TO_LAMBDA = """
sys.modules["prefect_slo"] = None
[error], _ = pickle.loads(sys.stdin.buffer.read())
"""


def elsewhere(program: str, given: bytes = b"") -> bytes:
    """What a process of its own says; it knows nothing of what was taught here."""
    path = os.pathsep.join(filter(None, sys.path))
    ran = subprocess.run(
        [sys.executable, "-c", f"import cloudpickle, copy, pickle, sys\n{program}"],
        input=given,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert ran.returncode == 0, ran.stderr.decode()
    return ran.stdout


@pytest.mark.parametrize(
    ("made", "words"), [("Refused(7, 'too late')", "7: too late"), ("Missing('thing')", "no thing")]
)
@pytest.mark.parametrize("lambda_there", [False, True], ids=["workers", "lambda"])
def test_what_has_come_from_another_process_is_copied_and_goes_on_to_a_third(
    tmp_path, monkeypatch, lambda_there, made, words
) -> None:
    (tmp_path / "refusals.py").write_text(CLASSES)
    monkeypatch.syspath_prepend(tmp_path)
    sending = FROM_LAMBDA if lambda_there else FROM_A_WORKER
    sent = elsewhere(f"from refusals import *\nerror = {made}\n{sending}\nsys.stdout.buffer.write(sent)")
    error = carried(Item(1, sent, True, "", 0.0, 0.0, 0.0, 0.0), 0.0, 0.0).value if lambda_there else pickle.loads(sent)
    name = made.partition("(")[0]
    assert (type(error).__name__, str(error)) == (name, words)
    assert str(copy.deepcopy(error)) == words
    going = dump_arguments((error,), {}, Parts()) if lambda_there else cloudpickle.dumps(error)
    said = elsewhere(
        f"{TO_LAMBDA if lambda_there else TO_A_WORKER}\nprint(type(error).__name__, error, sep='|')", going
    )
    assert said.decode().strip() == f"{name}|{words}"

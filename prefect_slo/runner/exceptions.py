"""Exceptions that travel between processes as what they are, also those that pickle and then don't unpickle.

Python makes an exception again by calling its class with ``args``. That fails where the constructor takes something
else, and where it makes a message of its one argument it makes another of the message. Such classes are taught to
pickle, here and in every process where one of their exceptions arrives: from there it goes on, and can be copied.
"""

from __future__ import annotations

import copyreg
import pickle
from typing import Any

import cloudpickle
from prefect.client.schemas.objects import State
from prefect.results import ResultRecord  # type: ignore[attr-defined]


def portable(error: BaseException) -> BaseException:
    """An exception that travels between processes: itself, or a plain one of the same words where nothing else does.

    Where it would not arrive as what it is, pickle makes exceptions of its class without their constructor from then
    on, of ``args`` and attributes.
    """
    if _arrives_alike(error):
        return error
    kind = type(error)
    before, alike = copyreg.dispatch_table.get(kind), False
    copyreg.pickle(kind, _reduced)
    try:
        alike = _arrives_alike(error)  # not so where a base keeps its words outside of Python's reach
    finally:
        if not alike:
            _restore(kind, before)
    return error if alike else RuntimeError(_words(error))


def without_constructor(error: BaseException) -> tuple[Any, ...] | None:
    """How an exception is pickled for those who lack this package; ``None`` where its class was not taught."""
    if copyreg.dispatch_table.get(type(error)) is not _reduced:
        return None
    return copyreg.__newobj__, *_reduced(error)[1:]  # type: ignore[attr-defined]


def raised_in(state: State[Any]) -> BaseException | None:
    """The exception that a state holds."""
    raised = state.data.result if isinstance(state.data, ResultRecord) else state.data
    return raised if isinstance(raised, BaseException) else None


def _arrives_alike(error: BaseException) -> bool:
    """Whether another process would get an exception of the same class and words."""
    try:
        dumped = cloudpickle.dumps(error)
        again, words = pickle.loads(dumped), str(error)
        if type(again) is not type(error):
            return False
        # Words that differ from copy to copy, for the address of an object in them, say nothing.
        return str(again) == words or str(pickle.loads(dumped)) != str(again)
    except Exception:  # whatever classes of users raise
        return False


def _restore(kind: type[BaseException], before: Any) -> None:
    """Have pickle treat a class as it did before."""
    copyreg.dispatch_table.pop(kind, None)
    if before is not None:
        copyreg.pickle(kind, before)


def _reduced(error: BaseException) -> tuple[Any, ...]:
    return _remade, (type(error), *error.args), error.__dict__ or None


def _remade(kind: type[BaseException], *args: Any) -> BaseException:
    """An exception as it arrives; what it has taken to get here is known here, too, from now on."""
    made = kind.__new__(kind, *args)
    copyreg.dispatch_table.setdefault(kind, _reduced)
    return made


def _words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # it cannot say itself
        return type(error).__name__

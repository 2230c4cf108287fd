"""Exceptions that travel between processes as what they are, also those that pickle and then don't unpickle."""

from __future__ import annotations

import copyreg
import pickle
from typing import Any

import cloudpickle
from prefect.client.schemas.objects import State
from prefect.results import ResultRecord  # type: ignore[attr-defined]


def portable(error: BaseException) -> BaseException:
    """An exception that travels between processes: itself, or a plain one of the same words where nothing else does.

    Python makes an exception again by calling its class with ``args``, which fails where its constructor takes
    something else. From then on pickle makes exceptions of that class without their constructor, of ``args`` and
    attributes.
    """
    kind = type(error)
    if _made_again(error) is not None:
        return error
    before = copyreg.dispatch_table.get(kind)
    copyreg.pickle(kind, _without_constructor)
    again = _made_again(error)
    if again is not None and str(again) == str(error):  # not so where a base keeps its words outside of Python's reach
        return error
    copyreg.dispatch_table.pop(kind)
    if before is not None:
        copyreg.pickle(kind, before)
    return RuntimeError(f"{kind.__name__}: {error}")


def raised_in(state: State[Any]) -> BaseException | None:
    """The exception that a state holds."""
    raised = state.data.result if isinstance(state.data, ResultRecord) else state.data
    return raised if isinstance(raised, BaseException) else None


def _made_again(error: BaseException) -> BaseException | None:
    """What another process would get; ``None`` where it would get nothing."""
    try:
        again: BaseException = pickle.loads(cloudpickle.dumps(error))
    except Exception:  # whatever classes of users raise
        return None
    return again


def _without_constructor(error: BaseException) -> tuple[Any, ...]:
    return copyreg.__newobj__, (type(error), *error.args), error.__dict__ or None  # type: ignore[attr-defined]

"""Tells apart the task objects behind one stage: closures from a factory, and what ``with_options`` makes of a task.

They have one task key, as they have the same code, and so share a stage; but each runs its own function under its own
options. Objects that are equal in both share a variant, so a loop of ``task.with_options(...).submit()`` makes one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, fields
from datetime import timedelta
from itertools import count
from typing import Any

from prefect import Task
from prefect.cache_policies import CachePolicy
from prefect.results import get_default_persist_setting_for_tasks, should_persist_result

from prefect_slo.runner import engine
from prefect_slo.runner.calls import ATOMS
from prefect_slo.runner.elsewhere import needs_no_values

KEPT = 64
"""Variants that a run remembers; one that comes again after that many others is pickled again."""


@dataclass(eq=False, slots=True)
class Variant:
    """One function under one set of options.

    Attributes:
        ordinal: Its number in the run, from 1.
        task: The first task object that was seen of it.
        eligible: Whether it asks for nothing that levels ``summary`` and ``bare`` leave out.
        valueless: Whether Prefect's engine looks at no argument and no result of it.
        program: What a worker process opens for it, once that has been pickled.
    """

    ordinal: int
    task: Task[Any, Any]
    eligible: bool
    valueless: bool = False
    program: bytes | None = None


class Variants:
    """The variants of one flow run. For one thread at a time."""

    def __init__(self) -> None:
        self._ordinals = count(1)
        self._known: OrderedDict[Hashable, Variant] = OrderedDict()
        self._last: tuple[Task[Any, Any], Variant] | None = None

    def of(self, task: Task[Any, Any]) -> Variant:
        """The variant of a task object, as its options are when it is first seen."""
        if self._last is not None and self._last[0] is task:
            return self._last[1]
        traits = _traits(task)
        variant = self._known.get(traits)
        if variant is None:
            variant = self._known[traits] = self._made(task)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(traits)
        self._last = task, variant
        return variant

    def __len__(self) -> int:
        return len(self._known)

    def _made(self, task: Task[Any, Any]) -> Variant:
        persisted = task.persist_result
        if persisted is None:
            persisted = should_persist_result() or get_default_persist_setting_for_tasks()
        return Variant(
            next(self._ordinals),
            task,
            eligible=engine.eligible(task, persisted=persisted, tagged=False),
            valueless=needs_no_values(task, persisted=persisted),
        )


def _traits(task: Task[Any, Any]) -> Hashable:
    """What tells a task object from others; names objects by id, so it holds while one of its tasks lives."""
    own = vars(task).items()
    return type(task), *(
        (name, _trait(value)) for name, value in own if name != "source_code" and not name.startswith("__")
    )


def _trait(value: Any) -> Hashable:
    """A value where equality is cheap and certain, else which object it is."""
    kind = type(value)
    if kind in ATOMS or kind is timedelta:
        return kind, value
    if kind in (list, tuple):
        return kind, *map(_trait, value)
    if kind in (set, frozenset):
        return kind, frozenset(map(_trait, value))
    if isinstance(value, CachePolicy):  # made anew by ``with_options`` of a task with a ``cache_key_fn``
        return kind, *(_trait(getattr(value, field.name)) for field in fields(value))
    return id(value)

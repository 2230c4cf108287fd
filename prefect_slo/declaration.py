"""What a user declares of a task: what may be done with it, and what may be chosen for it."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal, TypeVar

from prefect import Task
from prefect.utilities.callables import parameters_to_args_kwargs

from prefect_slo import units
from prefect_slo.errors import InvalidValue
from prefect_slo.placement import Share
from prefect_slo.plan import Record
from prefect_slo.resources import Menu

AnyTask = TypeVar("AnyTask", bound=Task[Any, Any])
_ATTRIBUTE, _BATCHED = "__slo__", "__slo_batched__"


@dataclass(frozen=True)
class Declaration:
    """What a user declares of a task; every field is optional.

    Attributes:
        idempotent: ``True``: may run again after its worker was lost, whatever its retries; ``False``: never may.
        batched: Its function takes lists, for its first parameter (``True``) or those named, and returns a list.
            The task itself keeps to single items, whatever runner it has; calls may be gathered into batches.
        pool: Pool that it runs on, or several that the planner may choose from (without a plan the first is taken);
            ``thread`` and ``process`` are always there, others are given to ``@slo(pools=[...])``.
        isolation: ``process`` or ``thread`` pins it; ``auto`` leaves it to the plan and to what pickles.
        menu: Dimensions of its menu in place of the flow's: ``workers``, ``vcpus``, ``memory_mb``, ``batch``, ``gpu``
            (shares of a GPU; 0 for none) and ``gpu_memory_mb`` (memory on it).
        pins: Choices that are fixed: ``workers``, ``vcpus``, ``memory_mb``, ``batch``, ``gpu``, ``gpu_memory_mb``,
            ``pool``.
        memory_mb: The least memory a worker needs.
        knobs: Values that the planner may pass for parameters of the task.
        concurrency: The most items of the task that may run at once in a flow run, wherever it is submitted.
        record: Record level, where the user fixes it.

    Raises:
        InvalidValue: A value that a field may not hold.
        InvalidWorkflow: Knobs without values, or by the name of another dimension.
    """

    idempotent: bool | None = None
    batched: bool | str | tuple[str, ...] = False
    pool: str | tuple[str, ...] | None = None
    isolation: Literal["auto", "process", "thread"] = "auto"
    menu: Mapping[str, Any] = field(default_factory=dict)
    pins: Mapping[str, Any] = field(default_factory=dict)
    memory_mb: int | None = None
    knobs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    concurrency: int | None = None
    record: Record | None = None

    def __post_init__(self) -> None:
        if self.isolation not in ("auto", "process", "thread"):
            raise InvalidValue("isolation", self.isolation, "'auto', 'process' or 'thread'")
        if self.record not in (None, "full", "summary", "bare"):
            raise InvalidValue("record", self.record, "'full', 'summary' or 'bare'")
        if self.memory_mb is not None:
            object.__setattr__(self, "memory_mb", units.megabytes(self.memory_mb))
        if self.concurrency is not None:
            units.whole(self.concurrency, "concurrency")
        if self.pool is not None and not isinstance(self.pool, str):
            object.__setattr__(self, "pool", tuple(self.pool))
        object.__setattr__(self, "menu", _menu(self.menu))
        object.__setattr__(self, "pins", _pins(self.pins))
        object.__setattr__(self, "knobs", dict(Menu(knobs=self.knobs).knobs))
        for name in self.pools:
            units.text(name, "pool")

    @property
    def pools(self) -> tuple[str, ...]:
        """Pools that it may run on; none where nothing is declared."""
        if "pool" in self.pins:
            return (str(self.pins["pool"]),)
        return self.pool if isinstance(self.pool, tuple) else () if self.pool is None else (self.pool,)

    @classmethod
    def of(cls, value: Declaration | Mapping[str, Any], where: str = "slo_task") -> Declaration:
        """A declaration from itself or from a mapping of its fields.

        Args:
            value: Either.
            where: What it was given to, for messages.

        Raises:
            InvalidValue: A field that there isn't, or a value that it may not hold.
        """
        if isinstance(value, Declaration):
            return value
        fields = ", ".join(cls.__dataclass_fields__)
        if not isinstance(value, Mapping):
            raise InvalidValue(where, value, f"a mapping with some of {fields}")
        for name in value:
            if name not in cls.__dataclass_fields__:
                raise InvalidValue(f"an argument of {where}", name, f"one of {fields}")
        return cls(**value)


def dimension(name: str, values: object, where: str) -> tuple[Any, ...]:
    """Values of one dimension of a menu, such as ``workers`` or ``memory_mb``; one stands for a list.

    Raises:
        InvalidValue: Nothing to choose from, or a value that can't be.
    """
    if name not in _DIMENSIONS:
        raise InvalidValue(where, name, f"one of {', '.join(_DIMENSIONS)}")
    several = tuple(values) if isinstance(values, (list, tuple, range)) else (values,)
    if not several:
        raise InvalidValue(f"{where}.{name}", values, "at least one value")
    return tuple(_DIMENSIONS[name](value, f"{where}.{name}") for value in several)


def _megabytes(value: Any, where: str) -> int:
    return units.megabytes(value, field=where)


def _gpu(value: Any, where: str) -> float:
    """A share of a GPU, whole ones, or 0."""
    return Share(value).gpu if units.finite(value, where) else 0.0


_DIMENSIONS: Mapping[str, Callable[[Any, str], Any]] = {
    "workers": units.whole,
    "vcpus": units.positive,
    "memory_mb": _megabytes,
    "batch": units.whole,
    "gpu": _gpu,
    "gpu_memory_mb": _megabytes,
}


def _menu(given: object) -> dict[str, tuple[Any, ...]]:
    if not isinstance(given, Mapping):
        raise InvalidValue("menu", given, f"a mapping with some of {', '.join(_DIMENSIONS)}")
    return {name: dimension(name, values, "menu") for name, values in given.items()}


def _pins(given: object) -> dict[str, Any]:
    known = (*_DIMENSIONS, "pool")
    if not isinstance(given, Mapping):
        raise InvalidValue("pins", given, f"a mapping with some of {', '.join(known)}")
    held: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise InvalidValue("pins", name, f"one of {', '.join(known)}")
        held[name] = units.text(value, "pins.pool") if name == "pool" else _DIMENSIONS[name](value, f"pins.{name}")
    return held


NOTHING = Declaration()


def slo_task(**fields: Any) -> Callable[[AnyTask], AnyTask]:
    """Declare what may be done with a task; see ``Declaration`` for the fields.

    Goes above ``@task``, and changes nothing where the flow isn't decorated with ``@slo``. Only ``batched`` does: the
    function is written for lists, and the task made of it takes and returns single items.

    Raises:
        InvalidValue: A field that there isn't, a value that it may not hold, or something that is not a task.

    Example:
        ```python
        @slo_task(idempotent=True, memory_mb=2048, menu={"workers": (1, 2, 4)})
        @task
        def train(shard): ...
        ```
    """
    declaration = Declaration.of(fields)

    def declare(task: AnyTask) -> AnyTask:
        if not isinstance(task, Task):
            raise InvalidValue("slo_task", task, "a Prefect task: put @slo_task(...) above @task")
        if declaration.batched:
            task.fn = _one_by_one(task, declaration)
        setattr(task.fn, _ATTRIBUTE, declaration)
        return task

    return declare


def declared(task: Task[Any, Any]) -> Declaration:
    """What was declared of a task by ``slo_task``."""
    found = getattr(task.fn, _ATTRIBUTE, NOTHING)
    return found if isinstance(found, Declaration) else NOTHING


# ---- batches --------------------------------------------------------------------------------------------------------


def batched_names(task: Task[Any, Any]) -> tuple[str, ...]:
    """Parameters of which a task's function takes lists; none for a task that isn't batched."""
    return getattr(task.fn, _BATCHED, ())


def function_of(task: Task[Any, Any]) -> Callable[..., Any]:
    """A task's function as it was written: for lists, where it is batched."""
    function: Callable[..., Any] = inspect.unwrap(task.fn, stop=lambda fn: not hasattr(fn, _BATCHED))
    return function


def with_function(task: Task[Any, Any], function: Callable[..., Any]) -> Task[Any, Any]:
    """A copy of a task that calls another function, one that takes what ``function_of(task)`` does."""
    other = copy.copy(task)
    other.fn = functools.wraps(function_of(task))(function)
    declaration = declared(task)
    if batched_names(task):
        other.fn = _one_by_one(other, declaration)
    setattr(other.fn, _ATTRIBUTE, declaration)
    return other


def undeclared(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function without what was declared of it: what travels to where this package isn't installed."""
    if not isinstance(function, FunctionType) or not {_ATTRIBUTE, _BATCHED} & set(function.__dict__):
        return function
    bare = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    bare.__kwdefaults__, bare.__qualname__ = function.__kwdefaults__, function.__qualname__
    bare.__module__ = function.__module__
    bare.__dict__.update({k: v for k, v in function.__dict__.items() if k not in (_ATTRIBUTE, _BATCHED)})
    return bare


def gathered(task: Task[Any, Any], arguments: dict[str, Any], run: Callable[[Any], Any]) -> list[Any]:
    """Call a batched task's function with lists; a result for each of their elements.

    Args:
        task: The task.
        arguments: Of its function: lists of one length for ``batched_names(task)``.
        run: Runs a coroutine to its end.

    Raises:
        InvalidValue: The function returned anything but a list of that length.
    """
    function = function_of(task)
    args, kwargs = parameters_to_args_kwargs(function, arguments)
    returned = function(*args, **kwargs)
    return _checked(task.name, run(returned) if task.isasync else returned, len(arguments[batched_names(task)[0]]))


def _one_by_one(task: Task[Any, Any], declaration: Declaration) -> Callable[..., Any]:
    """A batched task's function for single items."""
    function, name = task.fn, task.name
    if task.isgenerator:
        raise InvalidValue("batched", name, "a task that returns a list; a generator yields one")
    parameters = inspect.signature(function).parameters
    wanted = declaration.batched
    names = tuple(parameters)[:1] if wanted is True else (wanted,) if isinstance(wanted, str) else tuple(wanted or ())
    for batched in names or ("",):
        if batched not in parameters:
            raise InvalidValue("batched", batched, f"a parameter of task {name!r}: {', '.join(parameters)}")

    def single(args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        for batched in names:
            bound.arguments[batched] = [bound.arguments[batched]]
        return bound

    if task.isasync:

        @functools.wraps(function)
        async def one(*args: Any, **kwargs: Any) -> Any:
            bound = single(args, kwargs)
            return _checked(name, await function(*bound.args, **bound.kwargs), 1)[0]
    else:

        @functools.wraps(function)
        def one(*args: Any, **kwargs: Any) -> Any:
            bound = single(args, kwargs)
            return _checked(name, function(*bound.args, **bound.kwargs), 1)[0]

    setattr(one, _BATCHED, names)
    return one


def _checked(name: str, returned: Any, items: int) -> list[Any]:
    if not isinstance(returned, Sequence) or isinstance(returned, str | bytes) or len(returned) != items:
        raise InvalidValue(f"result of batched task {name!r}", returned, f"a list of {items}, one for each item")
    return list(returned)

"""What a user declares of a task: what may be done with it, and what may be chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from prefect import Task

from prefect_slo import units
from prefect_slo.errors import InvalidValue
from prefect_slo.plan import Record

AnyTask = TypeVar("AnyTask", bound=Task[Any, Any])
_ATTRIBUTE = "__slo__"


@dataclass(frozen=True)
class Declaration:
    """What a user declares of a task; every field is optional.

    Attributes:
        idempotent: ``True``: may run again after its worker was lost, whatever its retries; ``False``: never may.
        batched: Its function takes lists and returns a list: calls may be gathered into batches.
        pool: Pool that it runs on; ``thread`` and ``process`` are always there.
        isolation: ``process`` or ``thread`` pins it; ``auto`` leaves it to the plan and to what pickles.
        menu: Dimensions of its menu in place of the flow's: ``workers``, ``vcpus``, ``memory_mb``, ``batch``.
        pins: Choices that are fixed: ``workers``, ``vcpus``, ``memory_mb``, ``batch``, ``pool``.
        memory_mb: The least memory a worker needs.
        knobs: Values that the planner may pass for parameters of the task.
        concurrency: The most items that may run at once.
        record: Record level, where the user fixes it.
    """

    idempotent: bool | None = None
    batched: bool = False
    pool: str | None = None
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
        for name in self.menu:
            if name not in ("workers", "vcpus", "memory_mb", "batch"):
                raise InvalidValue("menu", name, "one of workers, vcpus, memory_mb, batch")
        for name in self.pins:
            if name not in ("workers", "vcpus", "memory_mb", "batch", "pool"):
                raise InvalidValue("pins", name, "one of workers, vcpus, memory_mb, batch, pool")

    @classmethod
    def of(cls, value: Declaration | Mapping[str, Any]) -> Declaration:
        """A declaration from itself or from a mapping of its fields.

        Raises:
            InvalidValue: A field that there isn't, or a value that it may not hold.
        """
        if isinstance(value, Declaration):
            return value
        for name in value:
            if name not in cls.__dataclass_fields__:
                raise InvalidValue("stages", name, f"one of {', '.join(cls.__dataclass_fields__)}")
        return cls(**value)


NOTHING = Declaration()


def slo_task(**fields: Any) -> Callable[[AnyTask], AnyTask]:
    """Declare what may be done with a task; see ``Declaration`` for the fields.

    Goes above ``@task``, and changes nothing where the flow isn't decorated with ``@slo``.

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
        setattr(task.fn, _ATTRIBUTE, declaration)
        return task

    return declare


def declared(task: Task[Any, Any]) -> Declaration:
    """What was declared of a task by ``slo_task``."""
    found = getattr(task.fn, _ATTRIBUTE, NOTHING)
    return found if isinstance(found, Declaration) else NOTHING

"""One item: a call of a task, with everything that Prefect's engine needs to run it somewhere else."""

from __future__ import annotations

from concurrent.futures import Future
from contextvars import Context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect import Task
from prefect.client.schemas.objects import RunInput, State

from prefect_slo.control.events import Kind

if TYPE_CHECKING:
    from prefect_slo.runner.origins import Origin
    from prefect_slo.runner.variants import Variant

ATOMS = (int, float, str, bytes, bool, type(None))
"""Values that hold no futures, pickle by themselves and are equal where they look equal."""

OVER = "This flow run has ended; its task runner takes no more work. Submit before the flow returns, or wait in it."


class FinalState(Future[State[Any]]):
    """Completed with the final state of a call. Lets go of its callbacks then: they refer back to it, and a result that
    nobody holds any more would stay until the garbage collector comes by."""

    def _invoke_callbacks(self) -> None:
        super()._invoke_callbacks()  # type: ignore[misc]
        self._done_callbacks.clear()  # type: ignore[attr-defined]


@dataclass(slots=True)
class Call:
    """A submitted call of a task.

    Attributes:
        item: Its id within the flow run.
        stage: Name of its stage.
        task: The task.
        variant: What tells it from other tasks with the same code.
        kind: How its items differ from others of its stage; ``None`` for those of the stage's first variant.
        task_run_id: Chosen at submission (uuid7, so that the id tells when).
        parameters: Bound arguments; may hold futures until the call is ready.
        wait_for: Futures to wait for, or ``None``.
        dependencies: Upstream task runs by parameter name: the edges that the UI draws.
        context: Context variables at submission: flow run, tags, settings.
        tags: Tags in force at submission.
        future: Completed with the final state.
        has_inputs: Whether parameters or ``wait_for`` hold futures or states.
        submitted: When (monotonic).
        ready: When the last upstream result was there (monotonic).
        late: Whether that was after the flow had returned, with nobody waiting for it.
        mapped: Upstream task runs whose results pass through memory that processes of this machine share.
        origin: How its result can be made again, where that stays with the worker and may be.
    """

    item: int
    stage: str
    task: Task[Any, Any]
    variant: Variant
    task_run_id: UUID
    parameters: dict[str, Any]
    wait_for: list[Any] | None
    dependencies: dict[str, set[RunInput]] | None
    context: Context
    tags: frozenset[str]
    kind: Kind | None = None
    future: Future[State[Any]] = field(default_factory=FinalState)
    has_inputs: bool = False
    submitted: float = 0.0
    ready: float = 0.0
    late: bool = False
    mapped: frozenset[UUID] = frozenset()
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Raised:
    """An item that raised instead of ending in a state (``SystemExit``, a pause, an abort).

    Attributes:
        error: What it raised.
        recorded: Whether Prefect's engine has written that down.
    """

    error: BaseException
    recorded: bool = True


@dataclass(frozen=True, slots=True)
class Returned:
    """An item that ran without Prefect's engine (levels ``summary`` and ``bare``) and returned a value."""

    value: Any


@dataclass(frozen=True, slots=True)
class Payload:
    """A call as a worker takes it: what Prefect's engine needs, and no more.

    Attributes:
        task_run_id: Its task run.
        parameters: Arguments; futures in them are states by now.
        wait_for: What it waited for, as states.
        dependencies: Upstream runs by parameter name.
        tags: Tags that it was submitted under.
        resolve: Whether there are states to resolve among its inputs.
        cancelled: Whether the engine is to record its cancellation in place of running it.
    """

    task_run_id: UUID
    parameters: dict[str, Any]
    wait_for: list[Any] | None
    dependencies: dict[str, set[RunInput]] | None
    tags: frozenset[str] = frozenset()
    resolve: bool = False
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class Several:
    """What a batch gave: a result for each of its calls, in order."""

    results: list[State[Any] | Returned | Raised]

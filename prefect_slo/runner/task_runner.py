"""The task runner: takes a flow's calls and runs them by a recipe."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Literal, Self

from prefect import Task
from prefect.client.schemas.objects import RunInput, State
from prefect.futures import PrefectConcurrentFuture, PrefectFuture, PrefectFutureList
from prefect.task_runners import TaskRunner

from prefect_slo.declaration import Declaration
from prefect_slo.errors import InvalidValue
from prefect_slo.plan import Plan, Record
from prefect_slo.runner import engine, worker_state
from prefect_slo.runner.calls import OVER, Payload, Raised
from prefect_slo.runner.flow_run import FlowClock, Run
from prefect_slo.runner.ids import uuid7
from prefect_slo.runner.pools import PoolDefinition, Pools, by_name, resolved
from prefect_slo.runner.recipe import Director, Isolation, Recipe
from prefect_slo.settings import valid_settings

if TYPE_CHECKING:
    pass


class SLOTaskRunner(TaskRunner[PrefectConcurrentFuture[Any]]):
    """Runs tasks by a plan: so many workers of such a size for each stage, items in bundles, warm worker processes.

    Without a plan it is a fast process pool (or thread pool) that keeps Prefect's states, retries, caching, logs,
    edges and tags. With ``@slo`` a director makes the plans.

    Args:
        plan: Stage plans by stage name; other stages run by the arguments below.
        isolation: ``auto``: worker processes, and threads for what doesn't pickle; ``process``: processes or a typed
            error; ``thread``: threads.
        max_workers: Workers of a stage without a plan.
        record: Record level of stages without a plan: ``full``, ``summary``, ``bare``, or ``auto`` by measured times.
        bundle: Items per dispatch; by default bundles grow from measured item times.
        stages: Declarations by task name, as ``slo_task`` makes them.
        director: Decides about each run in place of the arguments above, and hears how it went.
        pools: Pools beyond worker processes and threads, which plans and declarations may then name.
        pool: The one of them that stages run on without a plan or a declaration; by default worker processes.

    Raises:
        InvalidValue: A value that an argument may not hold.
        UnknownPool: There is no pool of that name.

    Example:
        ```python
        from prefect import flow, task
        from prefect_slo import SLOTaskRunner

        @task
        def square(x: int) -> int:
            return x * x

        @flow(task_runner=SLOTaskRunner(max_workers=2))
        def squares(n: int) -> list[int]:
            return square.map(range(n)).result()
        ```
    """

    def __init__(
        self,
        plan: Plan | None = None,
        *,
        isolation: Isolation = "auto",
        max_workers: int | None = None,
        record: Record | Literal["auto"] = "auto",
        bundle: int | None = None,
        stages: Mapping[str, Declaration | Mapping[str, Any]] | None = None,
        director: Director | None = None,
        pools: Sequence[PoolDefinition] = (),
        pool: str | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if isolation not in ("auto", "process", "thread"):
            raise InvalidValue("isolation", isolation, "'auto', 'process' or 'thread'")
        if record not in ("auto", "full", "summary", "bare"):
            raise InvalidValue("record", record, "'auto', 'full', 'summary' or 'bare'")
        for name, value in (("max_workers", max_workers), ("bundle", bundle)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidValue(name, value, "a whole number of at least 1")
        self.stages = {name: Declaration.of(value, f"stages[{name!r}]") for name, value in (stages or {}).items()}
        self.director = director
        self.pools: Pools = by_name(pools)
        pool = resolved(pool, self.pools) if pool is not None else None
        self.recipe = Recipe(plan, isolation, max_workers, record, bundle, pool=pool)
        self.stock: TaskRunner[Any] | None = None
        self.clock = FlowClock()
        self._run: Run | None = None
        self._leaving = False
        self._lock = threading.Lock()

    def duplicate(self) -> Self:
        """A runner for one flow run; the one that the flow had before where the package is off or wrongly set."""
        if self.stock is not None:
            settings = valid_settings()
            if settings is None or not settings.enabled:
                return self.stock.duplicate()  # type: ignore[return-value]
        copy = type(self)(stages=self.stages, director=self.director)
        copy.recipe, copy.stock, copy.pools = self.recipe, self.stock, self.pools
        return copy

    def submit(
        self,
        task: Task[Any, Any],
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
        dependencies: dict[str, set[RunInput]] | None = None,
    ) -> PrefectConcurrentFuture[Any]:
        """Take one call; returns a future of its final state at once."""
        if not self._started:
            raise RuntimeError("The task runner must be started before submitting work.")
        waits = list(wait_for) if wait_for is not None else None
        if worker_state.is_worker():
            return _run_in_place(task, parameters, waits, dependencies)
        return self._running().submit(task, parameters, waits, dependencies)

    def map(
        self,
        task: Task[Any, Any],
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
    ) -> PrefectFutureList[PrefectConcurrentFuture[Any]]:
        """Take a call per element; they are handed over together, so that small ones can travel in bundles."""
        if not self._started or worker_state.is_worker():
            return super().map(task, parameters, wait_for)
        run = self._running()
        with run.gathering():
            return super().map(task, parameters, wait_for)

    def cancel_all(self) -> None:
        """End everything that runs; nothing on a runner that has not been started."""
        if self._run is not None:
            self._run.close(at_once=True)

    def __enter__(self) -> Self:
        super().__enter__()
        self._leaving = False
        self.clock.entered = time.monotonic()
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        with self._lock:
            run, self._leaving = self._run, True
        try:
            if run is not None:
                self._end(run, exc_type)
        finally:
            self._run = None
            super().__exit__(exc_type, exc_value, traceback)

    def _end(self, run: Run, exc_type: type[BaseException] | None) -> None:
        interrupted = exc_type is not None and not issubclass(exc_type, Exception)
        failed, cut_short = exc_type is not None or self.clock.raised or run.raised, True
        try:
            run.close(at_once=interrupted, failed=failed)
            cut_short = interrupted
        finally:
            run.report(self.clock, failed=failed, cut_short=cut_short)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SLOTaskRunner):
            return NotImplemented
        mine, others = ((r.recipe, r.stages, r.director, r.pools) for r in (self, other))
        return mine == others

    def __hash__(self) -> int:
        return id(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("recipe", "stages", "director", "stock", "pools")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(stages=state["stages"], director=state["director"])  # type: ignore[misc]
        self.recipe, self.stock, self.pools = state["recipe"], state["stock"], state["pools"]

    def _running(self) -> Run:
        with self._lock:
            if self._run is None:
                if self._leaving:
                    raise RuntimeError(OVER)
                self._run = Run(self)
            return self._run


def _run_in_place(
    task: Task[Any, Any],
    parameters: dict[str, Any],
    wait_for: list[Any] | None,
    dependencies: dict[str, set[RunInput]] | None,
) -> PrefectConcurrentFuture[Any]:
    """A call submitted from inside a worker: run now, before this returns."""
    task_run_id = uuid7()
    future: Future[State[Any]] = Future()

    def run() -> None:
        result = engine.run_full(task, Payload(task_run_id, parameters, wait_for, dependencies))
        if isinstance(result, Raised):
            future.set_exception(result.error)
        else:
            future.set_result(result)

    if task.isasync and _loop_is_running():
        thread = threading.Thread(target=copy_context().run, args=(run,), name="prefect-slo-nested")
        thread.start()
        thread.join()
    else:
        run()
    return PrefectConcurrentFuture(task_run_id=task_run_id, wrapped_future=future)


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True

"""Running several calls of a batched task as one: its function gets lists and returns a list.

Calls travel together only at levels ``summary`` and ``bare``: one call of the function can't be several task runs of
Prefect's engine. Calls that share every argument that isn't batched make one batch; one whose upstream failed, or that
can't be resolved, ends by itself. Where a batch fails, its calls run one by one, so that only the bad ones fail, unless
the task is declared not idempotent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State

from prefect_slo.declaration import batched_names, declared, gathered
from prefect_slo.runner import engine
from prefect_slo.runner.calls import ATOMS, Payload, Raised, Returned

Result = State[Any] | Returned | Raised


def run(task: Task[Any, Any], calls: Sequence[Payload], runner: asyncio.Runner | None = None) -> list[Result]:
    """Run calls of a batched task; their results, in order."""
    results: dict[int, Result] = {}
    ready: list[tuple[int, dict[str, Any]]] = []
    for at, call in enumerate(calls):
        if call.cancelled:
            results[at] = engine.run_full(task, call, runner=runner)
            continue
        try:
            ready.append((at, engine.resolved(call.parameters, call.wait_for) if call.resolve else call.parameters))
        except BaseException:
            results[at] = engine.run_full(task, call, runner=runner)  # says what became of its upstream

    def alone(at: int) -> Result:
        return engine.run_bare(task, calls[at], runner=runner)

    for batch in _alike(ready, batched_names(task)):
        results.update(_run_batch(task, batch, runner, alone))
    return [results[at] for at in range(len(calls))]


def _run_batch(
    task: Task[Any, Any],
    batch: list[tuple[int, dict[str, Any]]],
    runner: asyncio.Runner | None,
    alone: Callable[[int], Result],
) -> dict[int, Result]:
    if len(batch) == 1:
        return {batch[0][0]: alone(batch[0][0])}
    together = dict(batch[0][1])
    for name in batched_names(task):
        together[name] = [values[name] for _, values in batch]
    try:
        returned = gathered(task, together, lambda coroutine: engine.run_async(coroutine, runner))
    except Exception as error:
        if declared(task).idempotent is False:
            return {at: engine.failed(error, task, None) for at, _ in batch}
        return {at: alone(at) for at, _ in batch}
    except BaseException as error:
        return {at: Raised(error, recorded=False) for at, _ in batch}
    return {at: Returned(value) for (at, _), value in zip(batch, returned, strict=True)}


def _alike(
    ready: list[tuple[int, dict[str, Any]]], names: tuple[str, ...]
) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Neighbours that share every argument that isn't batched."""
    batch: list[tuple[int, dict[str, Any]]] = []
    for entry in ready:
        if batch and not _shares(batch[0][1], entry[1], names):
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _shares(a: dict[str, Any], b: dict[str, Any], names: tuple[str, ...]) -> bool:
    return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a if name not in names)


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are one: the same object, or equal where that is cheap and certain."""
    return a is b or (type(a) is type(b) and isinstance(a, ATOMS) and bool(a == b))

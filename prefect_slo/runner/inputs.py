"""Finds the task runs whose results a call takes, and whether it holds futures to wait for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import RunInput, RunType, State, TaskRunResult
from prefect.futures import PrefectFuture
from prefect.utilities.annotations import quote
from prefect.utilities.collections import StopVisiting, visit_collection
from prefect.utilities.engine import get_state_for_result

from prefect_slo.runner.calls import ATOMS


def find_inputs(
    parameters: Mapping[str, Any], dependencies: Mapping[str, set[RunInput]] | None
) -> tuple[dict[str, set[RunInput]], bool]:
    """Upstream runs by parameter name, ``dependencies`` included, and whether there are futures or states."""
    found: dict[str, set[RunInput]] = {}
    holds_futures = False
    for name, value in parameters.items():
        if isinstance(value, ATOMS):
            inputs = _linked(value)
        else:
            inputs, futures = _visit(value)
            holds_futures |= futures
        if dependencies and name in dependencies:
            inputs = inputs | dependencies[name]
        if inputs:
            found[name] = inputs
    return found, holds_futures


def run_ids(inputs: Mapping[str, set[RunInput]], wait_for: list[Any] | None) -> set[UUID]:
    """Ids of the task runs among the inputs."""
    ids = {run.id for runs in inputs.values() for run in runs if isinstance(run, TaskRunResult)}
    for upstream in wait_for or ():
        ids |= {run.id for run in _visit(upstream)[0] if isinstance(run, TaskRunResult)}
    return ids


def _visit(value: Any) -> tuple[set[RunInput], bool]:
    inputs: set[RunInput] = set()
    futures = False

    def look(found: Any) -> None:
        nonlocal futures
        if isinstance(found, PrefectFuture):
            futures = True
            if (run_id := getattr(found, "task_run_id", None)) is not None:
                inputs.add(TaskRunResult(id=run_id))
        elif isinstance(found, State):
            futures = True
            if found.state_details.task_run_id:
                inputs.add(TaskRunResult(id=found.state_details.task_run_id))
        elif isinstance(found, quote):
            raise StopVisiting
        else:
            inputs.update(_linked(found))

    visit_collection(value, look, return_data=False)
    return inputs, futures


def _linked(value: Any) -> set[RunInput]:
    """The run that returned this very object, where Prefect remembers it."""
    link = get_state_for_result(value)
    if link is None:
        return set()
    state, kind = link
    result = state.state_details.to_run_result(kind if isinstance(kind, RunType) else RunType.TASK_RUN)
    return {result} if result is not None else set()

"""Record levels: what is left of an item in Prefect's records, and that nothing else depends on it."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from prefect import flow, task
from prefect.context import get_run_context
from prefect.futures import wait
from prefect.states import State

from prefect_slo.runner.task_runner import SLOTaskRunner


@task
def half(x: int) -> float:
    if x == 3:
        raise ValueError("three")
    return x / 2


@task
def total(parts: list[float]) -> float:
    return sum(parts)


@task(retries=1, retry_delay_seconds=0)
def twice(x: int) -> int:
    if get_run_context().task_run.run_count < 2:
        raise RuntimeError("once more")
    return x


@task
def rest(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@flow
def halves(n: int):
    futures = half.map(range(n))
    after = half.submit(futures[3])
    wait([*futures, after])
    good = [future for future in futures if future.state.is_completed()]
    return [future.state.name for future in futures], after.state.name, total.submit(good).result()


@flow
def retried(n: int):
    return twice.map(range(n)).result()


@flow
def naps(seconds: list[float]):
    return rest.map(seconds).result()


@task(task_run_name="half of {x}")
def named(x: int) -> float:
    return x / 2


@task
def submits(x: int) -> tuple[float, str]:
    inner = half.submit(x).result()
    return inner, get_run_context().task_run.task_key


@flow
def nesting(n: int):
    return submits.map([4] * n).result()


@flow
def with_names(n: int):
    return named.map(range(n)).result()


@flow
def many(n: int):
    return sum(total.map([[1.0]] * n).result())


@pytest.fixture(scope="module", params=["thread", "process"])
def isolation(request, prefect_server) -> str:
    return request.param


RUNS = {
    "halves": (halves, 6, "summary", 2),
    "naps": (naps, [0.05, 2.0], "summary", 2),
    "bare naps": (naps, [0.0] * 5, "bare", 2),
    "a nap after them": (naps, [0.0], "full", None),
    "names": (with_names, 2, "summary", 2),
    "many": (many, 300, "auto", None),
    **{("nesting", level, n): (nesting, 3, level, n) for level in ("summary", "bare") for n in (2, None)},
    **{("retried", level): (retried, 3, level, 2) for level in ("summary", "bare")},
}
"""Flow, argument, record level and limit of workers."""


@pytest.fixture(scope="module")
def ran(isolation) -> dict[Any, State[Any]]:
    """Final states of all these runs; all are over before one is read, as the server takes task runs in behind them."""
    return {
        name: run.with_options(task_runner=SLOTaskRunner(isolation=isolation, record=level, max_workers=workers))(
            given, return_state=True
        )
        for name, (run, given, level, workers) in RUNS.items()
    }


@pytest.mark.parametrize("level", ["full", "summary", "bare"])
def test_results_and_states_are_the_same_at_every_level(isolation, level):
    run = halves.with_options(task_runner=SLOTaskRunner(isolation=isolation, record=level, max_workers=2))
    names, after, result = run(6)
    assert names == ["Completed"] * 3 + ["Failed"] + ["Completed"] * 2
    assert after == "NotReady"
    assert result == (0 + 1 + 2 + 4 + 5) / 2


def test_a_summary_leaves_a_task_run_with_its_edges_for_every_item(ran, task_runs):
    found = task_runs(ran["halves"].state_details.flow_run_id, 8)
    kinds = Counter((run.task_key.rpartition("-")[0], run.state_name) for run in found)
    assert kinds == {
        ("half", "Completed"): 5,
        ("half", "Failed"): 1,
        ("half", "NotReady"): 1,
        ("total", "Completed"): 1,
    }
    [reduction] = [run for run in found if run.task_key.startswith("total")]
    sources = {source.id for source in reduction.task_inputs["parts"]}
    assert sources == {run.id for run in found if run.task_key.startswith("half") and run.state_name == "Completed"}
    assert {run.run_count for run in found if run.state_name != "NotReady"} == {1}


def test_a_summary_says_when_its_item_ran(ran, task_runs):
    took = sorted(run.total_run_time.total_seconds() for run in task_runs(ran["naps"].state_details.flow_run_id, 2))
    assert 0.04 < took[0] < 1.9 < took[1] < 20


def test_bare_leaves_no_task_run(ran, task_runs):
    assert ran["bare naps"].is_completed()
    later = task_runs(ran["a nap after them"].state_details.flow_run_id, 1)
    assert len(later) == 1, "what came later has been recorded"
    assert task_runs(ran["bare naps"].state_details.flow_run_id, 0) == []


def test_a_task_with_run_names_of_its_own_keeps_them(ran, task_runs):
    found = task_runs(ran["names"].state_details.flow_run_id, 2)
    assert {run.name for run in found} == {"half of 0", "half of 1"}


@pytest.mark.parametrize("level", ["summary", "bare"])
@pytest.mark.parametrize("workers", [2, None])
def test_what_an_item_submits_names_the_item_as_its_parent(ran, level, workers, task_runs):
    state = ran["nesting", level, workers]
    assert state.result() == [(2.0, submits.task_key)] * 3
    found = task_runs(state.state_details.flow_run_id, 6 if level == "summary" else 3)
    children = [run for run in found if run.task_key == half.task_key]
    parents = {parent.id for run in children for parent in run.task_inputs["__parents__"]}
    assert len(children) == len(parents) == 3
    outer = {run.id for run in found if run.task_key == submits.task_key}
    assert outer == parents if level == "summary" else outer <= parents


@pytest.mark.parametrize("level", ["summary", "bare"])
def test_a_task_that_asks_for_more_is_recorded_in_full_whatever_is_wanted(ran, level, task_runs):
    state = ran["retried", level]
    assert state.result() == [0, 1, 2]
    found = task_runs(state.state_details.flow_run_id, 3)
    assert [(run.state_name, run.run_count) for run in found] == [("Completed", 2)] * 3


def test_by_default_every_item_of_a_wide_map_of_tiny_items_has_its_task_run(ran, task_runs):
    state = ran["many"]
    assert state.result() == 300
    assert Counter(run.state_name for run in task_runs(state.state_details.flow_run_id, 300)) == {"Completed": 300}

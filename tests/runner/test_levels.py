"""Record levels: what is left of an item in Prefect's records, and that nothing else depends on it."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from prefect import flow, task
from prefect.context import get_run_context
from prefect.futures import wait

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


@pytest.fixture(params=["thread", "process"])
def isolation(request, prefect_server) -> str:
    return request.param


@pytest.mark.parametrize("level", ["full", "summary", "bare"])
def test_results_and_states_are_the_same_at_every_level(isolation, level):
    run = halves.with_options(task_runner=SLOTaskRunner(isolation=isolation, record=level, max_workers=2))
    names, after, result = run(6)
    assert names == ["Completed"] * 3 + ["Failed"] + ["Completed"] * 2
    assert after == "NotReady"
    assert result == (0 + 1 + 2 + 4 + 5) / 2


def test_a_summary_leaves_a_task_run_with_its_edges_for_every_item(isolation, task_runs):
    run = halves.with_options(task_runner=SLOTaskRunner(isolation=isolation, record="summary", max_workers=2))
    state = run(6, return_state=True)
    found = task_runs(state.state_details.flow_run_id, 8)
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


def test_a_summary_says_when_its_item_ran(isolation, task_runs):
    run = naps.with_options(task_runner=SLOTaskRunner(isolation=isolation, record="summary", max_workers=2))
    state = run([0.05, 2.0], return_state=True)
    took = sorted(run.total_run_time.total_seconds() for run in task_runs(state.state_details.flow_run_id, 2))
    assert 0.04 < took[0] < 1.9 < took[1] < 20


def test_bare_leaves_no_task_run(isolation, task_runs):
    run = naps.with_options(task_runner=SLOTaskRunner(isolation=isolation, record="bare", max_workers=2))
    state = run([0.0] * 5, return_state=True)
    assert state.is_completed()
    later = naps.with_options(task_runner=SLOTaskRunner(isolation=isolation, record="full"))([0.0], return_state=True)
    assert len(task_runs(later.state_details.flow_run_id, 1)) == 1, "what came later has been recorded"
    assert task_runs(state.state_details.flow_run_id, 0) == []


def test_a_task_with_run_names_of_its_own_keeps_them(isolation, task_runs):
    run = with_names.with_options(task_runner=SLOTaskRunner(isolation=isolation, record="summary", max_workers=2))
    state = run(2, return_state=True)
    assert {run.name for run in task_runs(state.state_details.flow_run_id, 2)} == {"half of 0", "half of 1"}


@pytest.mark.parametrize("level", ["summary", "bare"])
@pytest.mark.parametrize("workers", [2, None])
def test_what_an_item_submits_names_the_item_as_its_parent(isolation, level, workers, task_runs):
    run = nesting.with_options(task_runner=SLOTaskRunner(isolation=isolation, record=level, max_workers=workers))
    state = run(3, return_state=True)
    assert state.result() == [(2.0, submits.task_key)] * 3
    found = task_runs(state.state_details.flow_run_id, 6 if level == "summary" else 3)
    children = [run for run in found if run.task_key == half.task_key]
    parents = {parent.id for run in children for parent in run.task_inputs["__parents__"]}
    assert len(children) == len(parents) == 3
    outer = {run.id for run in found if run.task_key == submits.task_key}
    assert outer == parents if level == "summary" else outer <= parents


@pytest.mark.parametrize("level", ["summary", "bare"])
def test_a_task_that_asks_for_more_is_recorded_in_full_whatever_is_wanted(isolation, level, task_runs):
    run = retried.with_options(task_runner=SLOTaskRunner(isolation=isolation, record=level, max_workers=2))
    state = run(3, return_state=True)
    assert state.result() == [0, 1, 2]
    found = task_runs(state.state_details.flow_run_id, 3)
    assert [(run.state_name, run.run_count) for run in found] == [("Completed", 2)] * 3


def test_by_default_every_item_of_a_wide_map_of_tiny_items_has_its_task_run(isolation, task_runs):
    state = many.with_options(task_runner=SLOTaskRunner(isolation=isolation))(300, return_state=True)
    assert state.result() == 300
    assert Counter(run.state_name for run in task_runs(state.state_details.flow_run_id, 300)) == {"Completed": 300}

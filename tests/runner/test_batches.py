"""Batched tasks: one call of the function for many items, and the task itself keeps to single items."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prefect import flow, task, unmapped
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_slo.declaration import batched_names, slo_task
from prefect_slo.errors import InvalidValue
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.runner.recipe import ObservedRun, Recipe
from prefect_slo.runner.task_runner import SLOTaskRunner


@slo_task(batched=True)
@task
def widths(texts: list[str], scale: int = 1) -> list[tuple[int, int]]:
    """Each item's result, and how many items the call had."""
    if "bad" in texts:
        raise ValueError("bad among them")
    return [(scale * len(text), len(texts)) for text in texts]


@slo_task(batched=("xs", "ys"))
@task
async def sums(xs: list[int], ys: list[int]) -> list[int]:
    await asyncio.sleep(0)
    return [x + y for x, y in zip(xs, ys, strict=True)]


@slo_task(batched=True)
@task(retries=1, retry_delay_seconds=0)
def with_retries(xs: list[int]) -> list[int]:
    return [len(xs)] * len(xs)


@slo_task(batched=True)
@task
def too_few(xs: list[int]) -> list[int]:
    return xs[:-1]


@task
def word(n: int) -> str:
    if n < 0:
        raise ValueError("negative")
    return n * "x"


@flow
def widths_of(texts: list[str]) -> Any:
    futures = widths.map(texts, scale=unmapped(2))
    wait(futures)
    return [future.state.name if future.state.is_failed() else future.result() for future in futures]


@flow
def sums_of(n: int) -> Any:
    return sums.map(range(n), range(n)).result()


@flow
def widths_of_words(numbers: list[int]) -> Any:
    futures = widths.map(word.map(numbers))
    wait(futures)
    return [future.state.name if not future.state.is_completed() else future.result()[0] for future in futures]


@flow
def retried(n: int) -> Any:
    return with_retries.map(range(n)).result()


@flow
def short(n: int) -> Any:
    return [type(result).__name__ for result in too_few.map(range(n)).result(raise_on_failure=False)]


class Told:
    """A director that keeps what it is told."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.runs: list[ObservedRun] = []

    def recipe(self, flow_name: str, run_id: str, parameters: Any) -> Recipe:
        return self._recipe

    def heard(self, invocation: Any, run_id: str) -> None:
        """One bundle has ended."""

    def observed(self, run: ObservedRun) -> None:
        self.runs.append(run)


def batching(stage: str, batch: int, isolation: str, **more: Any) -> SLOTaskRunner:
    plan = Plan("flow", None, {stage: StagePlan(workers=1, batch=batch, **more)})
    return SLOTaskRunner(plan, isolation=isolation)


@pytest.fixture(params=["thread", "process"])
def isolation(request, prefect_server) -> str:
    return request.param


def test_a_batched_task_takes_and_returns_single_items_with_a_stock_runner(prefect_server):
    run = widths_of.with_options(task_runner=ThreadPoolTaskRunner())
    assert run(["a", "bb"]) == [(2, 1), (4, 1)]
    assert sums_of.with_options(task_runner=ThreadPoolTaskRunner())(3) == [0, 2, 4]


def test_without_a_plan_items_are_not_batched(isolation):
    assert widths_of.with_options(task_runner=SLOTaskRunner(isolation=isolation))(["a", "bb"]) == [(2, 1), (4, 1)]


def test_items_travel_in_batches_of_the_planned_size(isolation):
    run = widths_of.with_options(task_runner=batching("widths", 4, isolation))
    assert run(["a"] * 10) == [(2, 4)] * 8 + [(2, 2)] * 2


def test_several_parameters_and_async_tasks_are_batched(isolation):
    assert sums_of.with_options(task_runner=batching("sums", 3, isolation))(7) == [2 * n for n in range(7)]


def test_the_bad_item_of_a_batch_fails_alone(isolation):
    run = widths_of.with_options(task_runner=batching("widths", 4, isolation))
    assert run(["a", "bad", "c"]) == [(2, 1), "Failed", (2, 1)]


def test_items_whose_upstream_failed_do_not_hold_up_their_batch(isolation):
    run = widths_of_words.with_options(task_runner=batching("widths", 4, isolation, bundle=4))
    assert run([1, -1, 3]) == [1, "NotReady", 3]


def test_a_task_with_retries_is_not_batched_as_an_attempt_is_an_items_own(isolation):
    assert retried.with_options(task_runner=batching("with_retries", 4, isolation))(6) == [1] * 6


def test_a_function_that_returns_too_few_results_fails_its_items(isolation):
    assert short.with_options(task_runner=batching("too_few", 4, isolation))(3) == ["InvalidValue"] * 3


def test_the_batch_is_measured_with_its_stage(prefect_server):
    told = Told(Recipe(Plan("flow", None, {"widths": StagePlan(workers=1, batch=5)}), isolation="thread"))
    widths_of.with_options(task_runner=SLOTaskRunner(director=told))(["a"] * 10)
    [run] = told.runs
    [row] = run.stage_runs
    assert (row.items, row.batch) == (10, 5)


def test_a_declaration_of_a_parameter_that_there_is_not_is_refused():
    with pytest.raises(InvalidValue, match="parameter of task"):
        slo_task(batched="nothing")(task(lambda xs: xs))


def test_a_generator_cannot_be_batched():
    def yields(xs: list[int]):
        yield from xs

    with pytest.raises(InvalidValue, match="generator"):
        slo_task(batched=True)(task(yields))


def test_a_batched_task_keeps_its_name_signature_and_key():
    assert widths.name == "widths"
    assert widths.task_key.startswith("widths-")
    assert batched_names(widths) == ("texts",)
    assert batched_names(sums) == ("xs", "ys")

"""The runner as Prefect uses it: its arguments, its life, its director, and flows that use it from many threads."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import cloudpickle
import pytest
from prefect import flow, task
from prefect.context import get_run_context

from prefect_slo.errors import InvalidValue, SloError
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.runner import session, task_runner
from prefect_slo.runner.recipe import ObservedRun, Recipe
from prefect_slo.runner.task_runner import SLOTaskRunner


@task
def increment(x: int, by: int = 1) -> int:
    return x + by


@task
def total(xs: list[int]) -> int:
    return sum(xs)


@task
def refuse(x: int) -> int:
    raise ValueError(x)


@flow
def sums(n: int):
    return total.submit(increment.map(range(n))).result()


@flow
def from_threads(threads: int, n: int):
    """Maps the same task from many threads at once."""
    start = threading.Barrier(threads)

    def one() -> list[int]:
        start.wait()
        return increment.map(range(n)).result()

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(copy_context().run, one) for _ in range(threads)]
        return [each.result() for each in running]


class Told:
    """A director that keeps what it is told."""

    def __init__(self, recipe: Recipe | None = None, fails: str = "") -> None:
        self._recipe, self._fails = recipe or Recipe(isolation="thread"), fails
        self.runs: list[ObservedRun] = []
        self.invocations: list[Any] = []

    def recipe(self, flow_name: str, run_id: str, parameters: Any) -> Recipe:
        if self._fails == "recipe":
            raise RuntimeError("no plan today")
        return self._recipe

    def heard(self, invocation: Any, run_id: str) -> None:
        if self._fails == "heard":
            raise OSError("disk full")
        self.invocations.append(invocation)

    def observed(self, run: ObservedRun) -> None:
        if self._fails == "observed":
            raise RuntimeError("cannot keep it")
        self.runs.append(run)


@pytest.fixture
def notices(monkeypatch) -> list[str]:
    """What the runner has told the user."""
    said: list[str] = []
    monkeypatch.setattr(task_runner, "_log", said.append)
    return said


@pytest.mark.parametrize(
    ("argument", "value"),
    [("isolation", "box"), ("record", "some"), ("max_workers", 0), ("max_workers", True), ("bundle", 1.5)],
)
def test_arguments_out_of_range_are_refused(argument, value):
    with pytest.raises(InvalidValue, match=argument):
        SLOTaskRunner(**{argument: value})


def test_a_runner_travels_and_duplicates_with_its_configuration_alone():
    runner = SLOTaskRunner(max_workers=3, record="summary", stages={"increment": {"idempotent": True}})
    assert cloudpickle.loads(cloudpickle.dumps(runner)) == runner == runner.duplicate()
    assert runner != SLOTaskRunner(max_workers=4)


def test_a_runner_that_was_not_started_refuses_work_and_cancels_nothing():
    runner = SLOTaskRunner()
    runner.cancel_all()
    with pytest.raises(RuntimeError, match="started"):
        runner.submit(increment, {"x": 1})


def test_entering_a_runner_starts_nothing():
    before = set(threading.enumerate())
    with SLOTaskRunner().duplicate():
        assert set(threading.enumerate()) == before


def test_the_same_stage_from_many_threads_at_once(prefect_server):
    run = from_threads.with_options(task_runner=SLOTaskRunner(isolation="thread"))
    assert run(8, 20) == [[x + 1 for x in range(20)]] * 8


def test_one_runner_serves_several_runs_of_a_flow_at_once(prefect_server):
    run = sums.with_options(task_runner=SLOTaskRunner(isolation="process", max_workers=1))
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, [3, 4, 5])) == [6, 10, 15]


def test_a_director_hears_what_a_run_has_shown(prefect_server):
    told = Told()
    assert sums.with_options(task_runner=SLOTaskRunner(director=told))(4) == 10
    [run] = told.runs
    assert run.flow_name == "sums"
    assert run.status == "completed"
    assert [(stage.name, stage.items) for stage in run.workflow.stages] == [("increment", 4), ("total", 1)]
    assert {row.stage: row.items for row in run.stage_runs} == {"increment": 4, "total": 1}
    assert all(row.wall_s > 0 and row.compute_s > 0 for row in run.stage_runs)
    assert sum(invocation.items for invocation in told.invocations) == 5
    assert run.stages["increment"].key == "increment"
    assert run.stages["increment"].pickles is None
    assert dict(run.parameters) == {"n": 4}


def test_a_run_on_processes_shows_memory_bytes_and_that_its_stages_pickle(prefect_server):
    told = Told(Recipe(isolation="process", workers=1))
    sums.with_options(task_runner=SLOTaskRunner(director=told))(4)
    [run] = told.runs
    assert all(row.bytes_in > 0 and row.bytes_out > 0 and row.peak_memory_mb > 1 for row in run.stage_runs)
    assert run.stages["increment"].pickles is True
    assert run.cost_usd > 0


@flow
def partly_refused():
    good = increment.submit(1)
    refuse.submit(2).wait()
    return good.result()


def test_a_flow_that_does_without_a_failed_item_completes_and_only_that_stage_says_so(prefect_server):
    told = Told()
    partly_refused.with_options(task_runner=SLOTaskRunner(director=told))()
    [run] = told.runs
    assert run.status == "completed"
    assert {name: seen.failed for name, seen in run.stages.items()} == {"increment": 0, "refuse": 1}
    assert {row.stage for row in run.stage_runs} == {"increment", "refuse"}


@pytest.mark.parametrize("is_async", [False, True])
def test_a_run_ends_as_its_flow_ends(prefect_server, is_async):
    told = Told()

    def ends(how):
        increment.submit(1).wait()
        if how == "returns a failed task":
            return refuse.submit(2, return_state=True)
        if how == "raises":
            raise RuntimeError("no luck")
        return None

    def hangs(how):
        ends(how)
        threading.Event().wait(60)

    async def async_ends(how):
        return ends(how)

    async def async_hangs(how):
        ends(how)
        await asyncio.sleep(60)

    kinds = (async_ends, async_hangs) if is_async else (ends, hangs)
    how = ("returns", "returns a failed task", "raises", "takes too long")
    for each in how:
        subject = flow(kinds[each == "takes too long"]).with_options(task_runner=SLOTaskRunner(director=told))
        subject.timeout_seconds = 3 if each == "takes too long" else None
        state = subject(each, return_state=True)
        if is_async:
            asyncio.run(state)
    assert dict(zip(how, [run.status for run in told.runs], strict=True)) == {
        "returns": "completed",
        "returns a failed task": "failed",
        "raises": "failed",
        "takes too long": "timed_out",
    }


@flow
def locked(n: int):
    lock = threading.Lock()
    return [hold.submit(lock).result() for _ in range(n)]


@task
def hold(lock: Any) -> bool:
    return lock.locked()


def test_a_stage_that_did_not_pickle_is_remembered_as_such(prefect_server, notices):
    told = Told(Recipe(isolation="auto"))
    assert locked.with_options(task_runner=SLOTaskRunner(director=told))(2) == [False, False]
    seen = told.runs[0].stages["hold"]
    assert (seen.pickles, seen.pool) == (False, "thread")
    assert len(notices) == 1


@pytest.mark.parametrize("fails", ["recipe", "heard", "observed"])
def test_a_director_that_fails_never_fails_the_flow_and_is_heard_of_once(prefect_server, notices, fails):
    told = Told(fails=fails)
    assert sums.with_options(task_runner=SLOTaskRunner(director=told))(4) == 10
    assert len(notices) == 1


def test_a_planned_knob_reaches_the_task(prefect_server):
    plan = Plan("sums", None, {"increment": StagePlan(workers=1, knobs=(("by", 10),))})
    assert sums.with_options(task_runner=SLOTaskRunner(plan, isolation="thread"))(3) == 33


def test_a_stage_takes_no_more_workers_than_planned(prefect_server, tmp_path):
    told = Told(Recipe(Plan("sums", None, {"increment": StagePlan(workers=1)}), isolation="thread"))
    sums.with_options(task_runner=SLOTaskRunner(director=told))(30)
    assert len({invocation.worker for invocation in told.invocations if invocation.stage == "increment"}) == 1


def test_a_stage_pinned_to_processes_inside_a_transaction_is_refused(prefect_server):
    from prefect.transactions import transaction

    @flow(task_runner=SLOTaskRunner(isolation="process"))
    def spans():
        with transaction():
            return increment.submit(1).result()

    with pytest.raises(SloError, match="transaction"):
        spans()


def test_a_defect_of_the_runner_ends_the_flow_instead_of_hanging_it(prefect_server, monkeypatch):
    def broken(self, event, now):
        raise AssertionError("a defect")

    monkeypatch.setattr(session.Scheduler, "handle", broken)
    state = sums.with_options(task_runner=SLOTaskRunner(isolation="thread"))(3, return_state=True)
    assert not state.is_completed()
    assert "a defect" in str(state.message)


@flow
def nested(n: int):
    return outer.submit(n).result()


@task
def outer(n: int) -> tuple[int, str]:
    inner = increment.map(range(n)).result()
    return sum(inner), str(get_run_context().task_run.flow_run_id)


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_submits_inside_a_limited_worker_run_in_place(prefect_server, isolation):
    run = nested.with_options(task_runner=SLOTaskRunner(isolation=isolation, max_workers=1))
    state = run(4, return_state=True)
    assert state.result() == (10, str(state.state_details.flow_run_id))

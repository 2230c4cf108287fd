"""The runner as Prefect uses it: its arguments, its life, its director, and flows that use it from many threads."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any
from uuid import UUID

import cloudpickle
import pytest
from prefect import flow, task
from prefect.context import get_run_context
from prefect.futures import wait

from prefect_slo.declaration import slo_task
from prefect_slo.errors import InvalidValue, SloError
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.runner import endings, flow_run, session
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
    monkeypatch.setattr(flow_run, "_log", said.append)
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
        subject.timeout_seconds = 1 if each == "takes too long" else None
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


def test_where_the_director_fails_a_run_goes_by_the_runners_own_recipe(prefect_server, notices):
    told = Told(fails="recipe")
    runner = SLOTaskRunner(isolation="thread", max_workers=1, record="summary", director=told)
    assert sums.with_options(task_runner=runner)(4) == 10
    assert told.runs[0].recipe == runner.recipe
    assert {row.stage: row.workers for row in told.runs[0].stage_runs} == {"increment": 1, "total": 1}


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


def test_a_defect_of_the_runner_ends_the_flow_instead_of_hanging_it(prefect_server, monkeypatch, task_runs):
    def broken(self, event, now):
        raise AssertionError("a defect")

    monkeypatch.setattr(session.Scheduler, "handle", broken)
    before = set(threading.enumerate())
    state = sums.with_options(task_runner=SLOTaskRunner(isolation="thread"))(3, return_state=True)
    assert not state.is_completed()
    assert "a defect" in str(state.message)
    recorded = task_runs(state.state_details.flow_run_id, 4)
    assert [run.state_name for run in recorded] == ["Crashed"] * 4
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not left & {"prefect-slo-session", "prefect-slo-records"}


def test_an_ending_that_cannot_be_told_crashes_one_call_and_no_other(prefect_server, monkeypatch, task_runs):
    link = endings.link_state_to_task_run_result

    def fails_for_two(state, result):
        if result == 2:
            raise OSError("no room for it")
        link(state, result)

    monkeypatch.setattr(endings, "link_state_to_task_run_result", fails_for_two)
    run = ends.with_options(task_runner=SLOTaskRunner(isolation="thread", record="summary"))
    state = run(3, return_state=True)
    assert state.result() == ["Completed", "Crashed", "Completed"]
    recorded = task_runs(state.state_details.flow_run_id, 3)
    assert sorted(run.state_name for run in recorded) == ["Completed", "Completed", "Crashed"]


@flow
def ends(n: int) -> list[str]:
    futures = increment.map(range(n))
    wait(futures)
    return [str(future.state.name) for future in futures]


class Quits:
    """An argument that ends whoever pickles it."""

    def __reduce__(self) -> Any:
        raise SystemExit(1)


@flow
def takes_what_quits():
    kept = Quits()
    bad, good = kind.submit(kept), kind.submit(1)
    wait([bad, good])
    return bad.state.name, good.state.name


@task
def kind(value: Any) -> str:
    return type(value).__name__


def test_an_argument_that_quits_when_it_is_pickled_crashes_its_own_call(prefect_server):
    run = takes_what_quits.with_options(task_runner=SLOTaskRunner(isolation="process", max_workers=1))
    assert run() == ("Crashed", "Completed")


INSIDE: list[int] = []
MOST: list[int] = []


@slo_task(concurrency=2)
@task
def crowded(x: int) -> int:
    INSIDE.append(x)
    MOST.append(len(INSIDE))
    time.sleep(0.01)
    INSIDE.remove(x)
    return x


@flow
def crowded_in_two_places(n: int):
    first = crowded.map(range(n))
    second = crowded.map([increment.submit(x, by=n) for x in range(n)])
    return sum(first.result()) + sum(second.result())


def test_a_tasks_concurrency_holds_wherever_it_is_submitted(prefect_server):
    run = crowded_in_two_places.with_options(task_runner=SLOTaskRunner(isolation="thread", record="bare", bundle=1))
    assert run(20) == sum(range(40))
    assert max(MOST) == 2


# ---- the end of a run -----------------------------------------------------------------------------------------------


@task
def until(event: threading.Event) -> bool:
    return event.wait(60)


@flow
def returns_before_its_tasks(joined: dict[str, Any]):
    release, context = threading.Event(), copy_context()
    runner = get_run_context().task_runner

    def join() -> None:
        while not runner._leaving:
            time.sleep(0.01)
        joined["result"] = increment.submit(1).result()
        release.set()

    until.submit(release)
    joined["context"] = context
    threading.Thread(target=context.copy().run, args=(join,)).start()


def test_what_is_submitted_while_a_runner_exits_joins_its_run_and_nothing_comes_after(prefect_server, monkeypatch):
    told, joined = Told(), {}
    made = []
    begin = flow_run.Run.__init__
    monkeypatch.setattr(flow_run.Run, "__init__", lambda self, runner: (made.append(self), begin(self, runner))[1])
    run = returns_before_its_tasks.with_options(task_runner=SLOTaskRunner(director=told), validate_parameters=False)
    run(joined)
    assert joined["result"] == 2
    assert len(made) == len(told.runs) == 1
    with pytest.raises(RuntimeError, match=r"ended|started"):
        joined["context"].run(increment.submit, 1)


@task
def long(folder: str) -> None:
    (Path(folder) / "started").touch()
    time.sleep(120)


@flow
def returns_before_a_long_task(folder: str):
    long.submit(folder)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts this process, also where a shell has started it in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_flow_that_has_returned_waits_for_its_tasks_ends_them(
    interruptible, prefect_server, tmp_path, task_runs
):
    told = Told(Recipe(isolation="process", workers=1))
    runner = SLOTaskRunner(director=told)

    def interrupt() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    with suppress(KeyboardInterrupt):  # after the flow has returned, Prefect's engine keeps it to itself
        returns_before_a_long_task.with_options(task_runner=runner)(str(tmp_path))
    assert time.monotonic() - began < 100
    [run] = told.runs
    assert run.status == "crashed"
    assert [each.state_name for each in task_runs(UUID(run.run_id), 1)] == ["Cancelled"]


def test_a_second_ctrl_c_still_lets_go_of_workers_and_reports_the_run(prefect_server, monkeypatch):
    closed = []
    end, let_go = session.Session.close, flow_run.FlowBackends.close

    def interrupted(self, **how):
        end(self, **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Session, "close", interrupted)
    monkeypatch.setattr(flow_run.FlowBackends, "close", lambda self: (closed.append(self), let_go(self))[1])
    told = Told()
    with suppress(KeyboardInterrupt):  # after the flow has returned, Prefect's engine keeps it to itself
        sums.with_options(task_runner=SLOTaskRunner(director=told))(2)
    assert len(closed) == len(told.runs) == 1
    assert told.runs[0].status == "crashed"


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

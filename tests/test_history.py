from __future__ import annotations

import threading
import time
from collections.abc import Callable
from uuid import UUID, uuid4

import pytest
from prefect import flow, task
from prefect.cache_policies import INPUTS
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import TaskRun
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_slo import slo
from prefect_slo.blocks import fold_in
from prefect_slo.errors import InvalidValue, NotEnoughObservations
from prefect_slo.history import import_history, submitted_at
from prefect_slo.history.timing import call_of, most_at_once
from prefect_slo.loop import knowledge
from prefect_slo.loop.background import settle
from prefect_slo.telemetry.store import publish

pytestmark = pytest.mark.usefixtures("prefect_server")
tries: dict[str, int] = {}


def busy(seconds: float) -> None:
    threading.Event().wait(seconds)


@task
def load(n):
    busy(0.05)
    return list(range(n))


@task
def square(x):
    busy(0.2)
    return x * x


@task(retries=1, retry_delay_seconds=0.3)
def total(numbers, name):
    busy(0.1)
    tries[name] = tries.get(name, 0) + 1
    if tries[name] == 1:
        raise ValueError("once")
    return sum(numbers)


@task
def inner(x):
    return x


@task
def outer(x):
    return inner(x)


@task(cache_policy=INPUTS, persist_result=True)
def remembered(x, name):
    return x


def ran(subject: Callable[..., object], expected: int, *args: object) -> None:
    """Run a flow, and wait until the server has recorded that many task runs in a final state."""
    state = subject(*args, return_state=True)
    assert state.is_completed()
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            runs = client.read_task_runs(flow_run_filter=wanted)
            if sum(run.state is not None and run.state.is_final() for run in runs) == expected:
                return
            busy(0.2)
    raise AssertionError(f"{len(runs)} task runs of {expected} were recorded in a minute")


def test_a_flow_that_ran_before_gives_its_graph_and_its_timings():
    @flow(name="old pipeline", task_runner=ThreadPoolTaskRunner(max_workers=2))
    def pipeline(name: str) -> int:
        numbers = load.submit(4)
        squares = square.map(numbers)
        return total.submit(squares, name).result()

    for number in range(2):
        ran(pipeline, 6, f"pipeline-{number}")
    history = import_history("old pipeline")

    assert history.workflow.order == ("load", "square", "total")
    assert history.workflow["square"].items == 4
    assert history.workflow["total"].parents == ("square",)
    assert len(history.records) == len(history.run_latency_s) == 2
    assert (history.task_runs, history.left_out) == (12, 0)

    rows = {row.stage: row for row in history.stage_runs.rows() if row.run_id == history.records[0].run_id}
    assert (rows["square"].workers, rows["square"].items, rows["square"].hardware) == (2, 4, "unknown")
    # a loaded machine only ever adds to what the tasks sleep
    assert 0.39 < rows["square"].compute_s <= rows["square"].wall_s + 1e-6  # four calls of 0.2 s on two threads
    assert rows["total"].compute_s > 0.19  # two attempts of 0.1 s
    assert rows["total"].wall_s - rows["total"].compute_s > 0.29  # 0.3 s apart: the wait between them is no work
    longest = sum(row.wall_s for row in rows.values())
    assert longest <= history.run_latency_s[history.records[0].run_id] + 0.05


def test_cached_and_nested_task_runs_say_nothing_about_time():
    @flow(name="old cached")
    def cached(name: str) -> None:
        first = remembered.submit(1, name)
        first.wait()
        remembered.submit(1, name).wait()
        outer.submit(2).wait()

    ran(cached, 4, str(uuid4()))
    history = import_history("old cached")
    assert set(history.stage_runs["stage"]) == {"outer"}
    assert {stage.row.stage: stage.status for stage in history.records[0].stages} == {
        "remembered": "cached",
        "outer": "completed",
    }
    assert (history.task_runs, history.left_out) == (4, 1)


def test_imported_runs_can_be_learned_from():
    @flow(name="old and learned")
    def learned() -> None:
        square.map([1, 2]).wait()

    ran(learned, 2)
    history = import_history("old and learned", limit=1, hardware="laptop")
    publish("old and learned", history.records)
    profile = fold_in("old and learned", fit=lambda workflow, rows, latency_s: {"n": len(rows), "runs": len(latency_s)})
    assert profile.model_document() == {"n": 1, "runs": 1}
    assert profile.training().keys[0].hardware == "laptop"


def test_imported_runs_of_workers_that_are_known_can_be_planned_on():
    @task
    def halve(x):
        busy(0.02)
        return x // 2

    def body(n: int) -> int:
        return sum(halve.map(range(n)).result())

    for number in range(4):
        workers = 1 + number % 2
        stock = flow(name="old and planned", task_runner=ThreadPoolTaskRunner(max_workers=workers))(body)
        ran(stock, 4, 4)
    history = import_history("old and planned", hardware="thread", vcpus=1, memory_mb=512)
    assert {(row.hardware, row.vcpus, row.memory_mb) for row in history.stage_runs.rows()} == {("thread", 1.0, 512.0)}
    publish("old and planned", history.records)
    menu = {"workers": (1, 2), "vcpus": 1}
    seen = slo(latency=20, menu=menu, stages={"halve": {"isolation": "thread"}})(flow(name="old and planned")(body))
    seen(4)  # the first run under @slo brings the menus
    assert settle(60)
    known = knowledge.knowledge("old and planned")
    assert known.missing() == ""
    assert known.plan is not None


def test_a_flow_without_runs_is_refused_with_the_next_step():
    with pytest.raises(NotEnoughObservations, match="prefect flow ls"):
        import_history("never seen")
    with pytest.raises(InvalidValue, match="vcpus"):
        import_history("never seen", vcpus=0)
    with pytest.raises(InvalidValue, match="limit"):
        import_history("never seen", limit=0)


def test_the_time_of_submission_is_read_from_version_7_ids():
    assert submitted_at(UUID("018f0000-0000-7000-8000-000000000000")) == 0x018F00000000 / 1000
    assert submitted_at(uuid4()) is None


def test_a_completed_task_run_whose_times_were_lost_does_not_train():
    lost = TaskRun(task_key="t-1", dynamic_key="0", flow_run_id=uuid4(), state_type="COMPLETED", state_name="Completed")
    call = call_of(None, lost)
    assert (call.status, call.spans) == ("crashed", ())
    assert call_of(None, lost.model_copy(update={"id": uuid4()})) is None
    assert call_of(None, lost.model_copy(update={"state_name": "NotReady"})) is None


def test_workers_are_the_most_calls_that_overlap():
    assert most_at_once([(0.0, 1.0), (1.0, 2.0), (0.5, 1.5), (5.0, 6.0)]) == 2
    assert most_at_once([]) == 1

"""Workers that die, outgrow their memory or hang: the right state and typed error, and nothing else is touched."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections import Counter
from pathlib import Path

from prefect import flow, task
from prefect.futures import wait

from prefect_slo.declaration import slo_task
from prefect_slo.errors import OutOfMemory, TaskTimedOut, WorkerLost
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import Size
from prefect_slo.runner import packing
from prefect_slo.runner.task_runner import SLOTaskRunner


def ends(futures):
    wait(futures)
    return [(future.state.name, type(future.state.data)) for future in futures]


@task
def maybe_killed(x: int, victim: int) -> int:
    if x == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


@flow
def one_of_many_is_killed(n: int):
    futures = maybe_killed.map(list(range(n)), victim=3)
    wait(futures)
    assert [f.state.name for f in futures] == ["Crashed" if i == 3 else "Completed" for i in range(n)]
    return futures[3].state.data, [f.result() for f in futures if f.state.is_completed()]


def test_a_killed_worker_crashes_the_item_that_it_ran_and_no_other(run_isolated, recorded):
    state = run_isolated(one_of_many_is_killed, 40)
    error, values = state.result()
    assert isinstance(error, WorkerLost)
    assert "signal 9" in error.reason
    assert values == [i for i in range(40) if i != 3]
    found = recorded(state.state_details.flow_run_id, 40)
    assert found == Counter({("maybe_killed", "Completed"): 39, ("maybe_killed", "Crashed"): 1})


def killed_once(folder: str) -> int:
    marker = Path(folder) / "tried"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 7


with_retries = task(retries=1, retry_delay_seconds=0)(killed_once)


@slo_task(idempotent=True)
@task
def idempotent(folder: str) -> int:
    return killed_once(folder)


@slo_task(idempotent=False)
@task(retries=3)
def never_again(folder: str) -> int:
    return killed_once(folder)


@flow
def tried(which: str, folder: str):
    future = {"retries": with_retries, "idempotent": idempotent, "never": never_again}[which].submit(folder)
    future.wait()
    return future.state.name, future.state.data


def test_an_item_of_a_task_with_retries_runs_again_elsewhere(run_isolated, recorded, tmp_path):
    state = run_isolated(tried, "retries", str(tmp_path))
    assert state.result()[0] == "Completed"
    assert recorded(state.state_details.flow_run_id, 1) == {("killed_once", "Completed"): 1}


def test_an_item_declared_idempotent_runs_again_elsewhere(run_isolated, tmp_path):
    assert run_isolated(tried, "idempotent", str(tmp_path)).result()[0] == "Completed"


def test_an_item_declared_not_idempotent_never_runs_again(run_isolated, tmp_path):
    name, error = run_isolated(tried, "never", str(tmp_path)).result()
    assert (name, type(error)) == ("Crashed", WorkerLost)


@task
def allocate(mb: int) -> int:
    held = [bytearray(b"x" * 2**20) for _ in range(mb)]
    time.sleep(0.3)
    return len(held)


@flow
def too_much(mb: int):
    first = allocate.submit(mb)
    first.wait()
    second = allocate.submit(1)
    return first.state.name, first.state.data, second.result()


def test_running_out_of_memory_ends_the_item_and_the_next_runs_in_a_new_worker(run_isolated, recorded):
    plan = Plan("too-much", None, {"allocate": StagePlan(workers=1, size=Size(1, 320))})
    state = run_isolated(too_much, 900, runner=SLOTaskRunner(plan, isolation="process"))
    name, error, after = state.result()
    assert (name, type(error), after) == ("Crashed", OutOfMemory, 1)
    assert error.limit_mb < error.peak_mb
    found = recorded(state.state_details.flow_run_id, 2)
    assert found == {("allocate", "Crashed"): 1, ("allocate", "Completed"): 1}


@task(timeout_seconds=0.5)
def hangs_in_c(rounds: int) -> int:
    return len(hashlib.pbkdf2_hmac("sha256", b"", b"", rounds))


@flow
def hangs():
    futures = hangs_in_c.map([2_000_000_000, 1])
    wait(futures)
    hung = futures[0].state
    return (hung.name, hung.type.value, hung.data), futures[1].result()


def test_a_task_that_hangs_in_c_code_is_timed_out(run_isolated, recorded, monkeypatch):
    monkeypatch.setattr(packing, "GRACE_S", 1.0)
    began = time.monotonic()
    state = run_isolated(hangs)
    (name, kind, error), other = state.result()
    assert (name, kind, type(error), other) == ("TimedOut", "FAILED", TaskTimedOut, 32)
    assert time.monotonic() - began < 30
    assert recorded(state.state_details.flow_run_id, 2) == {
        ("hangs_in_c", "TimedOut"): 1,
        ("hangs_in_c", "Completed"): 1,
    }


def arrive(seconds: float) -> str:
    time.sleep(seconds)
    return "late"


class Slow:
    """An argument that takes its time to unpickle."""

    def __reduce__(self):
        return arrive, (2.5,)


@task(timeout_seconds=0.5)
def quick(value) -> str:
    return value


@flow
def takes_a_slow_argument():
    return quick.submit(Slow()).result()


def test_the_time_that_an_argument_takes_to_arrive_is_not_the_tasks(run_isolated):
    assert run_isolated(takes_a_slow_argument).result() == "late"


@task(timeout_seconds=1, retries=2, retry_delay_seconds=0)
def slow_twice(folder: str) -> int:
    attempts = len(list(Path(folder).iterdir()))
    (Path(folder) / str(attempts)).touch()
    for _ in range(100 if attempts < 2 else 1):
        time.sleep(0.02)
    return attempts


@flow
def slow_then_fine(folder: str):
    return slow_twice.submit(folder).result()


def test_the_hard_limit_leaves_room_for_every_attempt_of_a_task_with_a_timeout(run_isolated, tmp_path):
    assert run_isolated(slow_then_fine, str(tmp_path)).result() == 2

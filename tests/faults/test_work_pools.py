"""Work pools whose API, worker or pilots go away in the middle: recovery or a typed error, and nothing left running."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists

from prefect_slo import SLOTaskRunner, WorkPool, slo_task
from prefect_slo.errors import WorkerLost, WorkPoolUnusable
from prefect_slo.resources import Size
from prefect_slo.runner.work_pools import shut_offices
from prefect_slo.runner.workpool import watch
from prefect_slo.runner.workpool.jobs import Jobs
from prefect_slo.runner.workpool.pilot import Order

POOL = "faults"


def pool(folder: Path, **terms: Any) -> WorkPool:
    return WorkPool(POOL, (Size(0.5, 512),), folder, concurrency=1, **{"idle_s": 600.0, **terms})


@slo_task(pool=POOL)
@task
def nap(x: int) -> int:
    time.sleep(0.3)
    return x


@slo_task(pool=POOL, isolation="process")
@task
def insist(x: int) -> int:
    return x


@flow
def insists(n: int) -> list[int]:
    return insist.map(range(n)).result()


@flow
def naps(n: int) -> list[int]:
    return nap.map(range(n)).result()


def test_an_outage_of_the_api_in_the_middle_loses_no_result_and_leaves_no_task_run_open(
    wire: Any, own_process_pool: Any, recorded: Any, run_isolated: Any, tmp_path: Path
) -> None:
    own_process_pool(POOL, PREFECT_API_URL=f"http://127.0.0.1:{wire.port}/api")
    runner = SLOTaskRunner(pools=[pool(tmp_path)], record="full")
    assert run_isolated(naps, 1, runner=runner).is_completed()  # the pilot is warm: the outage comes while items run
    threading.Timer(0.5, wire.break_off).start()
    threading.Timer(3.0, wire.mend).start()
    state = run_isolated(naps, 10, runner=runner)
    assert wire.severed > 0
    assert state.result() == list(range(10))
    assert recorded(state.state_details.flow_run_id, 10) == Counter({("nap", "Completed"): 10})


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_no_pilot_with_it_that_runs(
    own_process_pool: Any, recorded: Any, run_isolated: Any, tmp_path: Path
) -> None:
    worker = own_process_pool(POOL)
    runner = SLOTaskRunner(pools=[pool(tmp_path)], record="full")
    assert run_isolated(naps, 1, runner=runner).is_completed()
    worker.kill()
    worker.wait()
    state = run_isolated(naps, 4, runner=runner)
    assert state.result() == [0, 1, 2, 3]
    assert recorded(state.state_details.flow_run_id, 4) == Counter({("nap", "Completed"): 4})


def test_a_job_that_nobody_starts_any_more_is_a_typed_error_that_says_so(
    prefect_server: str, recorded: Any, run_isolated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.2)
    with get_client(sync_client=True) as client, contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    runner = SLOTaskRunner(pools=[pool(tmp_path, patience_s=0.1, give_up_s=1.0)], record="full")
    state = run_isolated(insists, 1, runner=runner)
    shut_offices()
    with pytest.raises(WorkerLost, match="no worker started"):
        state.result()
    found = recorded(state.state_details.flow_run_id, 1)
    assert set(found) == {("insist", "Crashed")}


def test_jobs_of_a_deleted_pool_are_gone_and_the_next_ones_go_to_the_one_made_anew(
    prefect_server: str,
) -> None:
    """Its worker makes it again, under its name; what was asked for before is in no pool, and waits for ever."""
    name = "deleted"
    order = Order({}, "box", "office", asdict(Size(1, 512)), 1.0, 1.0, 1.0, 1.0)
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        jobs = Jobs(name, None)
        jobs.prepare()
        first = jobs.start("first", order, {})
        assert set(jobs.states([first])) == {first}
        client.delete_work_pool(name)
        assert not jobs.states([first])
        with pytest.raises(WorkPoolUnusable, match="does not exist"):
            jobs.start("second", replace(order, box="second"), {})
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        third = jobs.start("third", replace(order, box="third"), {})
        assert client.read_flow_run(third).work_pool_name == name
        assert set(jobs.states([first, third])) == {third}
    jobs.close()

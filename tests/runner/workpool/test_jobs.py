"""Pilots' jobs as Prefect's API knows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed, Pending, Running

from prefect_slo.runner.workpool.jobs import Jobs
from prefect_slo.runner.workpool.pilot import Order


@pytest.fixture(scope="module")
def jobs(prefect_server: str) -> Iterator[Jobs]:
    """Of a pool without a worker."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="called-off", type="process"))
    made = Jobs("called-off", None)
    made.prepare()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("states", "found", "then"),
    [
        ([], "unbegun", StateType.CANCELLED),
        ([Pending()], "starting", StateType.CANCELLING),
        ([Pending(), Running()], "running", StateType.CANCELLING),
        ([Pending(), Crashed()], "over", StateType.CRASHED),
    ],
)
def test_a_job_that_is_called_off_is_told_by_how_far_it_had_come(
    jobs: Jobs, states: list[Any], found: str, then: StateType
) -> None:
    order = Order({}, f"pilot-{uuid4().hex}", "office", {"vcpus": 1, "memory_mb": 512}, 1.0, 1.0, 1.0, 1.0)
    run = jobs.start("called-off", order, {})
    with get_client(sync_client=True) as client:
        for state in states:
            client.set_flow_run_state(run, state)
    assert jobs.cancel(run) == found
    after = jobs.states([run])[run]
    assert after is not None
    assert after.type == then

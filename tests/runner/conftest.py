"""Reads back what the API has of a flow run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import TaskRun

SETTLE_S = 120.0


@pytest.fixture
def task_runs(prefect_server: str) -> Callable[..., list[TaskRun]]:
    """The task runs of a flow run, once there are as many as expected and all have ended."""

    def read(flow_run_id: UUID, expected: int) -> list[Any]:
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        deadline = time.monotonic() + SETTLE_S
        with get_client(sync_client=True) as client:
            while True:
                found: list[TaskRun] = []
                for page in range(20):
                    some = client.read_task_runs(flow_run_filter=chosen, limit=200, offset=200 * page)
                    found += some
                    if len(some) < 200:
                        break
                ended = all(run.state_name not in (None, "Pending", "Running") for run in found)
                if (len(found) >= expected and ended) or time.monotonic() > deadline:
                    return found
                time.sleep(0.1)

    return read

"""Calls whose engine stays in the flow's process while their function travels."""

from __future__ import annotations

import logging
from contextlib import suppress
from contextvars import copy_context
from typing import Any
from uuid import uuid4

import pytest
from prefect import task

from prefect_slo.runner.backends.protocol import ItemReport, NotSent, WorkerGone
from prefect_slo.runner.calls import Payload
from prefect_slo.runner.hosted import FunctionProgram

pytestmark = pytest.mark.usefixtures("prefect_server")


@task
def double(x: int) -> int:
    return 2 * x


@task
async def double_later(x: int) -> int:
    return 2 * x


def finished(records: list[logging.LogRecord]) -> list[str]:
    """What Prefect has said of runs that finished."""
    return [record.getMessage() for record in records if record.getMessage().startswith("Finished in state")]


@pytest.mark.parametrize("called", [double, double_later], ids=["sync", "async"])
@pytest.mark.parametrize("error", [NotSent("6.1 MB are too large"), WorkerGone("its worker is gone")], ids=repr)
def test_a_call_that_goes_on_elsewhere_is_not_said_to_have_finished(called: Any, error: BaseException, caplog) -> None:
    """It left the engine while it was running."""
    told: list[ItemReport] = []

    def carry(*_: Any, **__: Any) -> Any:
        raise error

    call = Payload(uuid4(), {"x": 1}, None, None)
    with caplog.at_level(logging.INFO, logger="prefect.task_runs"):
        work = (copy_context(), (called, [call], "full"))
        with suppress(WorkerGone):  # which is the backend's to deal with
            FunctionProgram.of(called).host([(0, work)], carry, told.append)
        assert [report.outcome.unpicklable for report in told] == [str(error)] * isinstance(error, NotSent)
        assert finished(caplog.records) == []
        double(3)
    assert finished(caplog.records) == ["Finished in state Completed()"], "others are heard of as ever"

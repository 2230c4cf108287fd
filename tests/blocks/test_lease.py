from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from prefect.concurrency.sync import concurrency

from prefect_slo.blocks.lease import profile_lease
from prefect_slo.telemetry.store import slug

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_one_holder_at_a_time():
    inside, most = [], []

    def hold(_: int) -> None:
        with profile_lease("one holder", timeout_s=60):
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.02)
            inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, range(8)))
    assert most == [1] * 8


def test_a_lease_that_this_process_holds_times_others_out():
    with profile_lease("held here", timeout_s=5), ThreadPoolExecutor(1) as pool:
        other = pool.submit(_take, "held here", 0.05)
        with pytest.raises(TimeoutError, match="held here"):
            other.result()


def test_a_lease_that_another_process_holds_times_others_out():
    _take("held there", 5)
    with concurrency(f"slo-profile-{slug('held there')}", occupy=1, strict=True), pytest.raises(TimeoutError):
        _take("held there", 0.5)
    _take("held there", 60)


def _take(flow_name: str, timeout_s: float) -> None:
    with profile_lease(flow_name, timeout_s=timeout_s):
        pass

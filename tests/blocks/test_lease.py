from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency

from prefect_slo.blocks import lease
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


def test_a_lease_that_is_held_for_a_moment_is_waited_for_little_longer(monkeypatch):
    with get_client(sync_client=True) as api:
        with profile_lease("held a moment", timeout_s=5, client=api):
            pass
        held, slept = lease._granted(f"slo-profile-{slug('held a moment')}", api), list[float]()
        assert held is not None

        def sleep(pause_s: float) -> None:
            slept.append(pause_s)
            if sum(slept) > 0.3:
                api.release_concurrency_slots_with_lease(held)

        monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
        _take("held a moment", 60)
    assert sum(slept) <= 2 * 0.3 + 0.05


def _take(flow_name: str, timeout_s: float) -> None:
    with profile_lease(flow_name, timeout_s=timeout_s):
        pass

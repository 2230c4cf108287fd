"""Prefect's API goes away while a flow runs, and comes back: the flow and its records are whole."""

from __future__ import annotations

import threading
import time
from collections import Counter

from prefect import flow, task


@task
def nap(x: int) -> int:
    time.sleep(0.2)
    return x


@flow
def naps(n: int) -> list[int]:
    return nap.map(range(n)).result()


def test_a_flow_outlives_an_outage_of_the_api_and_nothing_is_missing(run_isolated, wire, recorded):
    assert run_isolated(naps, 2).is_completed()  # workers are warm, so that the outage comes while items run
    threading.Timer(0.5, wire.break_off).start()
    threading.Timer(3.0, wire.mend).start()
    state = run_isolated(naps, 12)
    assert wire.severed > 0
    assert state.result() == list(range(12))
    assert recorded(state.state_details.flow_run_id, 12) == Counter({("nap", "Completed"): 12})

"""Jobs behind the flow: in order, in their context, awaited where somebody asks, and when the process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextvars import ContextVar

from prefect_slo.blocks import SLOProfile
from prefect_slo.loop.background import Background

NAME: ContextVar[str] = ContextVar("name")


def test_jobs_run_one_after_another_in_the_context_they_were_left_in():
    behind, heard = Background(), []
    for name in ("a", "b", "c"):
        token = NAME.set(name)
        behind.soon(lambda: heard.append(NAME.get()))
        NAME.reset(token)
    assert behind.settle(60)
    assert heard == ["a", "b", "c"]


def test_whoever_waits_is_told_whether_all_is_done():
    behind, go_on = Background(), threading.Event()
    assert behind.settle(0), "there is nothing to do"
    behind.soon(lambda: go_on.wait(60) and None)
    assert not behind.settle(0.01)
    go_on.set()
    assert behind.settle(60)


def test_a_job_that_waits_for_itself_does_not_hang():
    behind, heard = Background(), []
    behind.soon(lambda: heard.append(behind.settle()))
    assert behind.settle(60)
    assert heard == [False]


ENDS = """
import threading
from concurrent.futures import ThreadPoolExecutor
from prefect_slo.loop import background

ends = threading.Event()
def job():
    ends.wait(60)
    with ThreadPoolExecutor(1) as pool:  # as HTTP clients do for names of hosts
        print(pool.submit(lambda: "learned").result())
background.soon(job)
threading._register_atexit(ends.set)  # comes before what was registered before it
"""


def test_a_process_that_ends_finishes_what_is_left_to_do():
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "learned\n", done.stderr


WRITES = """
import threading
from prefect_slo.blocks import update_profile
from prefect_slo.loop import background

ends = threading.Event()
def job():
    ends.wait(60)
    update_profile("written at the end", lambda profile: profile.model_copy(update={"objective": {"latency_s": 3.0}}))
background.soon(job)
threading._register_atexit(ends.set)
"""


def test_a_process_that_ends_still_writes_profiles(prefect_server):
    """As each run of a deployment does: it ends as soon as its flow has, and learns from it then."""
    env = {**os.environ, "PREFECT_API_URL": prefect_server}
    done = subprocess.run(
        [sys.executable, "-c", WRITES], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    profile = SLOProfile.of_flow("written at the end")
    assert profile is not None, done.stderr
    assert profile.objective == {"latency_s": 3.0}

"""Ctrl-C once and twice, and the end of the flow's process: no orphans, no task run that runs for ever."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client

SOURCE = """
import sys, time
from pathlib import Path
from prefect import flow, task
from prefect.context import get_run_context
from prefect_slo.runner.task_runner import SLOTaskRunner

@task
def long(folder, n):
    (Path(folder) / f"started{n}").touch()
    for _ in range(6000):
        time.sleep(0.01)

@flow(task_runner=SLOTaskRunner(isolation="process", max_workers=2))
def main(folder):
    (Path(folder) / "id").write_text(str(get_run_context().flow_run.id))
    long.map(folder, list(range(4))).wait()

if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else FOLDER)
"""


@pytest.fixture
def running(program, tmp_path):
    """A program whose flow has started two items, which last a minute each."""
    one = program(SOURCE.replace("FOLDER", repr(str(tmp_path))))
    one.wait_for(tmp_path / "started0")
    time.sleep(0.5)
    return one


def flow_run_id(folder: Path) -> UUID:
    return UUID((folder / "id").read_text())


def state_of(run_id: UUID) -> str:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run_id).state
    assert state is not None
    return state.type.value


def test_ctrl_c_ends_the_flow_within_seconds_and_leaves_nothing_running(running, recorded, tmp_path):
    os.kill(running.process.pid, signal.SIGINT)
    assert running.end(timeout_s=60) < 30
    assert running.process.returncode != 0
    assert not running.orphans()
    run_id = flow_run_id(tmp_path)
    assert state_of(run_id) in ("CRASHED", "CANCELLED", "FAILED")
    found = recorded(run_id, 1)
    assert {name for _, name in found} <= {"Cancelled", "Crashed"}, found


def test_ctrl_c_twice_ends_the_flow_too(running):
    os.kill(running.process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.kill(running.process.pid, signal.SIGINT)
    assert running.end(timeout_s=60) < 30
    assert not running.orphans()


def test_workers_end_with_a_flow_that_is_killed(running):
    running.process.kill()
    running.process.wait()
    assert not running.orphans()

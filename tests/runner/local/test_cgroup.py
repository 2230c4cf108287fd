from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from prefect_slo.runner.local import cgroup
from prefect_slo.runner.local.cgroup import MemoryGroup
from prefect_slo.runner.local.memory import resident_mb

HOARD = "import sys; sys.stdin.read(1); held = b'x' * (400 << 20); print(len(held))"


@pytest.fixture
def group():
    made = MemoryGroup.make(999_999)
    if made is None:
        pytest.skip("control groups can't be made here")
    yield made
    made.close()
    assert not made.path.exists()


@pytest.fixture
def hoard(group: MemoryGroup) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a process in the group that takes 400 MB."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen([sys.executable, "-c", HOARD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert group.add(started[-1].pid)
        started[-1].stdin.write("go")
        started[-1].stdin.close()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_what_allocates_beyond_the_cap_is_stopped(group, hoard):
    assert group.cap(100)
    assert not group.over
    process = hoard()
    deadline = time.monotonic() + 30
    while not group.over:
        assert time.monotonic() < deadline
        assert process.poll() in (None, -signal.SIGKILL)
        time.sleep(0.01)
    assert resident_mb(process.pid) < 300


def test_what_stays_below_the_cap_is_left_alone_and_caps_can_be_moved_both_ways(group, hoard):
    assert group.cap(50)
    assert group.cap(1000)
    assert hoard().wait(30) == 0
    assert not group.over
    assert group.cap(50)


def test_groups_of_processes_that_are_gone_are_removed(group, monkeypatch):
    gone = next(pid for pid in range(4_000_000, 1, -1) if not psutil.pid_exists(pid))
    left = group.path.with_name(f"prefect-slo-{gone}-1")
    left.mkdir()
    cgroup._sweep(group.path.parent)
    assert not left.exists()
    assert group.path.exists()


def test_where_no_group_can_be_made_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(cgroup, "_place", lambda: (tmp_path / "missing", cgroup._SECOND))
    assert MemoryGroup.make(1) is None
    monkeypatch.setattr(cgroup, "_place", lambda: (tmp_path, cgroup._SECOND))
    assert MemoryGroup.make(1) is None, "a folder without the controller's files is no group"
    assert list(tmp_path.iterdir()) == []

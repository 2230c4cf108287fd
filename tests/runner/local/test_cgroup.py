from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from prefect_slo.runner.local import cgroup
from prefect_slo.runner.local.cgroup import MemoryGroup

HOARD = "import sys; sys.stdin.read(1); held = b'x' * (400 << 20); print(len(held))"


@pytest.fixture
def group():
    made = MemoryGroup.make(999_999)
    if made is None:
        pytest.skip("control groups can't be made here")
    yield made
    made.close()
    assert not made.path.exists()


def hoard(group: MemoryGroup) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOARD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert group.add(process.pid)
    process.communicate("go")
    return process


def test_what_allocates_beyond_the_cap_is_killed(group):
    assert group.cap(100)
    assert hoard(group).returncode == -signal.SIGKILL
    assert group.has_killed


def test_what_stays_below_the_cap_is_left_alone_and_caps_can_be_moved_both_ways(group):
    assert group.cap(50)
    assert group.cap(1000)
    assert hoard(group).returncode == 0
    assert not group.has_killed
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

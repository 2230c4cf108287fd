"""Resident memory of a process and of what it has started."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import psutil
import pytest

from prefect_slo.runner.local.memory import MemoryWatch, family_of, proportional_mb, resident_mb

HOLD = "held = bytearray({} << 20); print('held', flush=True); input()"
TREE = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
input()
child.communicate(b"\\n")
"""


@pytest.fixture
def run():
    started = []

    def start(code):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.communicate("\n")


def test_memory_is_what_the_system_says(run):
    process, _ = run(HOLD.format(100))
    assert resident_mb(process.pid) == pytest.approx(psutil.Process(process.pid).memory_info().rss / 2**20, rel=0.05)
    assert resident_mb(process.pid) > 100


def test_children_count_with_their_parent(run):
    process, child = run(TREE.format(child=HOLD.format(100)))
    assert family_of(process.pid) == [process.pid, int(child)]
    assert resident_mb(process.pid) > 100
    assert proportional_mb(process.pid) > 100


def test_pages_shared_by_a_fork_count_once_in_proportion(run):
    fork = "import os, time; held = bytearray(100 << 20); child = os.fork(); print(child, flush=True); "
    process, _ = run(fork + "input() if child else time.sleep(600); os.kill(child, 9); os.wait()")
    assert resident_mb(process.pid) > 200
    assert proportional_mb(process.pid) < 180


def test_a_process_that_is_gone_holds_nothing():
    process = subprocess.Popen(["true"])
    process.wait()
    assert resident_mb(process.pid) == 0


def test_the_watch_tells_of_excess_and_rests_when_nothing_is_busy():
    told, looked, before = threading.Event(), [], set(threading.enumerate())
    workers = [(7, os.getpid(), 1.0, None)]

    def exceeded(token, used_mb):
        looked.append((token, used_mb))
        workers.clear()
        told.set()

    watch = MemoryWatch(lambda: workers, lambda token, used_mb: None, exceeded, interval_s=0.01)
    try:
        watch.wake()
        assert told.wait(10)
        (token, used_mb), *more = looked
        assert (token, more) == (7, [])
        assert used_mb > 1
    finally:
        watch.close()
    assert not any(thread.name == "prefect-slo-memory" for thread in set(threading.enumerate()) - before)

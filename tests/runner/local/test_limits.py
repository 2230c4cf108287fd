"""Cores, threads and memory of a machine and of a worker."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from prefect_slo.runner.local import limits


@pytest.mark.parametrize(("vcpus", "threads"), [(0.25, 1), (1, 1), (1.0000000001, 1), (1.5, 2), (8, 8)])
def test_threads_are_vcpus_rounded_up(vcpus, threads):
    assert limits.threads_of(vcpus) == threads
    assert set(limits.thread_environment(vcpus).values()) == {str(threads)}
    assert "OMP_NUM_THREADS" in limits.thread_environment(vcpus)


def test_the_machine_has_what_the_system_says():
    assert 0 < limits.machine_vcpus() <= os.cpu_count()
    assert 100 < limits.machine_memory_mb() < 2**31


@pytest.mark.skipif(not limits.HAS_AFFINITY, reason="the system has no affinity")
def test_all_threads_of_a_process_are_bound_and_a_process_that_is_gone_is_not():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    core = min(os.sched_getaffinity(0))
    assert limits.pin(process.pid, (core,))
    assert os.sched_getaffinity(process.pid) == {core}
    process.communicate(b"\n")
    assert not limits.pin(process.pid, (core,))


@pytest.mark.skipif(not limits.HAS_AFFINITY, reason="the system has no affinity")
def test_threads_that_run_already_are_bound_too():
    before, found, go = os.sched_getaffinity(0), [], threading.Event()
    thread = threading.Thread(target=lambda: (go.wait(), found.append(os.sched_getaffinity(0))))
    thread.start()
    try:
        assert limits.pin(0, (min(before),))
        go.set()
        thread.join()
        assert found == [{min(before)}]
    finally:
        limits.pin(0, before)

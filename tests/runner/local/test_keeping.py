"""Which workers are kept, which go first, and when time is up for one."""

from __future__ import annotations

import itertools
import os
import socket
import time

import pytest

from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Bundle
from prefect_slo.runner.local.keeping import PoolConfig, due, idle, in_the_way
from prefect_slo.runner.local.member import Fate, Lease, Worker
from prefect_slo.runner.local.page import Page
from prefect_slo.runner.local.setup import Surroundings

HERE = Surroundings({}, (), "/")
CONFIG = PoolConfig(idle_s=60, start_timeout_s=30)
BUNDLE = Bundle(1, "key", b"", ((0, b""), (1, b"")), timeout_s=5)


@pytest.fixture
def worker():
    """Makes workers that no process stands behind."""
    made, others, tokens = [], [], itertools.count(1)

    def make(**fields):
        fd = Page.allocate()
        ours, theirs = socket.socketpair()
        made.append(Worker(next(tokens), Size(1, 512), ours, Page(fd), 100.0, HERE, (), **({"pid": 1} | fields)))
        os.close(fd)
        others.append(theirs)
        return made[-1]

    yield make
    for thing in (*made, *others):
        thing.close()


def lease():
    return Lease(1, Size(1, 512), print, "", HERE, 0.0)


def test_an_idle_worker_is_dismissed_after_its_time(worker):
    assert due(worker(idle_since=10.0), CONFIG, 20.0) == (70.0, None)


def test_a_leased_worker_without_a_bundle_has_all_the_time(worker):
    assert due(worker(lease=lease()), CONFIG, 20.0)[0] == float("inf")
    assert due(worker(lease=lease(), fate=Fate("died", "")), CONFIG, 20.0)[0] == float("inf")


def test_a_worker_that_does_not_report_has_the_start_timeout(worker):
    at, fate = due(worker(pid=0, lease=lease()), CONFIG, 20.0)
    assert (at, fate.reason) == (130.0, "start")


def test_a_timeout_runs_from_the_start_of_the_running_item(worker):
    busy = worker(lease=lease(), bundle=BUNDLE, serial=4)
    assert due(busy, CONFIG, 20.0)[0] == 25.0  # nothing runs yet: look again then
    busy.page.bundle(4)
    busy.page.start(1, 18.0)
    at, fate = due(busy, CONFIG, 20.0)
    assert (at, fate.reason, fate.index) == (23.0, "timeout", 1)


def test_a_bundle_without_a_timeout_has_all_the_time(worker):
    endless = Bundle(1, "key", b"", ((0, b""),))
    assert due(worker(lease=lease(), bundle=endless), CONFIG, 20.0)[0] == float("inf")


def test_idle_workers_are_those_nobody_has_in_order_of_use(worker):
    late, early = worker(idle_since=2.0), worker(idle_since=1.0)
    taken = [worker(lease=lease()), worker(pid=0), worker(leaving=1.0), worker(fate=Fate("died", ""))]
    assert idle([late, *taken, early]) == [early, late]


def test_memory_is_made_room_for_by_the_least_recently_used(worker):
    late, early = worker(idle_since=2.0, resident_mb=100.0), worker(idle_since=1.0, resident_mb=100.0)
    taken = worker(lease=lease(), limit_mb=512.0, resident_mb=100.0)
    everyone = [late, taken, early]
    assert in_the_way(everyone, Size(1, 512), 512 + 512 + 200) == []
    assert in_the_way(everyone, Size(1, 512), 512 + 512 + 100) == [early]
    assert in_the_way(everyone, Size(1, 512), 512) == [early, late]


def test_a_loss_is_told_with_what_the_page_says(worker):
    mine = lease()
    busy = worker(lease=mine, bundle=BUNDLE, serial=1, limit_mb=512.0)
    busy.page.bundle(1)
    assert busy.loss(mine, 9).untouched == (0, 1)
    busy.page.start(0, time.monotonic())
    assert (busy.loss(mine, 9).running, busy.loss(mine, 9).untouched) == (0, (1,))
    assert busy.loss(mine, 9).detail == "killed by signal 9"
    assert busy.loss(mine, 3 << 8).detail == "exit status 3"
    busy.fate = Fate("timeout", "too long", index=0)
    assert busy.loss(mine, 9).reason == "timeout"
    busy.page.end(0)  # it finished as it was being ended: the timeout is no one's
    assert (busy.loss(mine, 9).reason, busy.loss(mine, 9).running) == ("died", None)

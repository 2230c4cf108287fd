"""Shares of GPUs under random load: nothing is overfilled, and nobody starves."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from prefect_slo.control.device_line import DeviceLine
from prefect_slo.errors import GpuShareTooLarge, InvalidValue
from prefect_slo.placement import Device, Share

SEQUENCES = 10_000
ONE = (Device("0", 16_384),)


def test_a_request_that_fits_goes_ahead_of_one_that_does_not():
    line = DeviceLine(ONE)
    line.ask(1, Share(0.75))
    line.ask(2, Share(0.5))
    line.ask(3, Share(0.25))
    assert [id_ for id_, _ in line.advance()] == [1, 3]
    assert line.waiting[0].overtaken == 1


def test_one_that_was_overtaken_often_enough_is_next():
    line = DeviceLine(ONE, overtakes=2)
    line.ask(1, Share(0.5))
    line.advance()
    line.ask(2, Share(1))
    for small in (3, 4, 5):
        line.ask(small, Share(0.1))
    assert [id_ for id_, _ in line.advance()] == [3, 4]
    for held in (1, 3, 4):
        line.leave(held)
    assert [id_ for id_, _ in line.advance()] == [2]


def test_without_overtaking_it_is_first_come_first_served():
    line = DeviceLine(ONE, overtakes=0)
    for id_, gpu in ((1, 0.75), (2, 0.5), (3, 0.25)):
        line.ask(id_, Share(gpu))
    assert [id_ for id_, _ in line.advance()] == [1]


def test_whoever_stops_waiting_holds_nobody_up():
    line = DeviceLine(ONE, overtakes=0)
    for id_, gpu in ((1, 0.75), (2, 0.5), (3, 0.25)):
        line.ask(id_, Share(gpu))
    line.advance()
    line.leave(2)
    assert line.serve(3) == (0,)


def test_what_could_never_be_served_does_not_get_in_line():
    line = DeviceLine(ONE)
    with pytest.raises(GpuShareTooLarge):
        line.ask(1, Share(0.5, 20_000))
    assert not line.waiting


def test_nobody_stands_in_line_twice():
    line = DeviceLine(ONE)
    line.ask(1, Share(0.5))
    with pytest.raises(InvalidValue):
        line.ask(1, Share(0.5))


@pytest.mark.parametrize("sequences", [1_500, pytest.param(SEQUENCES, marks=pytest.mark.slow)])
def test_capacity_holds_and_everyone_is_served_under_random_load(sequences):
    rng = np.random.default_rng(2026)
    waited = overtaken = 0
    for _ in range(sequences):
        line, asked = random_line(rng), 0
        passed: Counter[int] = Counter()
        events = int(rng.integers(8, 25))
        for step in range(10_000):
            holders = list(line.occupancy.held)
            if step < events and rng.random() < 0.65:
                share = random_share(rng, line)
                if share is not None:
                    asked += 1
                    line.ask(asked, share)
            elif holders:
                line.leave(int(rng.choice(holders)))
            before = [request.id for request in line.waiting]
            for id_, _ in line.advance():
                passed.update(other for other in before[: before.index(id_)] if other in waiting_ids(line))
                waited += 1
            assert_nothing_is_overfilled(line)
            assert not (line.waiting and not line.occupancy.held), "somebody waits while every device is empty"
            if step >= events and not line.waiting:
                break
        assert not line.waiting, "somebody was never served"
        assert max(passed.values(), default=0) <= line.overtakes
        overtaken += sum(passed.values())
    assert waited > sequences
    assert overtaken > sequences / 10


def random_line(rng: np.random.Generator) -> DeviceLine:
    devices = tuple(
        Device(str(k), float(rng.choice([8_192, 16_384, 81_920])), float(rng.choice([0.5, 1.0, 1.0])))
        for k in range(int(rng.integers(1, 4)))
    )
    return DeviceLine(devices, overtakes=int(rng.integers(0, 5)), fit="best" if rng.random() < 0.5 else "first")


def random_share(rng: np.random.Generator, line: DeviceLine) -> Share | None:
    """One that could be served at all."""
    kind = rng.random()
    gpu = float(rng.integers(1, 3)) if kind < 0.15 else float(rng.choice([0.05, 0.1, 0.25, 0.3, 0.5, 0.75]))
    share = Share(gpu, float(rng.choice([0, 0, 1_000, 6_000, 12_000])))
    try:
        DeviceLine(line.devices).ask(1, share)
    except GpuShareTooLarge:
        return None
    return share


def waiting_ids(line: DeviceLine) -> set[int]:
    return {request.id for request in line.waiting}


def assert_nothing_is_overfilled(line: DeviceLine) -> None:
    """Added up anew from what is held, not from the line's own counters."""
    for position, device in enumerate(line.devices):
        here = [share for share, at in line.occupancy.held.values() if position in at]
        assert sum(share.cores for share in here) <= device.cores + 1e-9
        assert sum(share.memory_on(device) for share in here) <= device.memory_mb * (1 + 1e-9)
        assert len(here) == 1 or all(share.gpu < 1 for share in here)

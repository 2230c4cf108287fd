"""Who gets a share of a GPU next. Random load is in ``tests/runner/local/test_gpu_ledger.py``."""

from __future__ import annotations

from prefect_slo.control.device_line import DeviceLine, Waiting
from prefect_slo.placement import Device, Share

ONE = (Device("0", 16_384),)


def line(*shares: float, overtakes: int = 16) -> DeviceLine:
    """Requests 1, 2, … for shares of one device."""
    return DeviceLine(ONE, overtakes, waiting=[Waiting(id_, Share(gpu)) for id_, gpu in enumerate(shares, 1)])


def served(line: DeviceLine) -> list[int]:
    """Who is served when everyone asks once, in order."""
    return [request.id for request in tuple(line.waiting) if line.serve(request.id) is not None]


def test_a_request_that_fits_goes_ahead_of_one_that_does_not():
    at = line(0.75, 0.5, 0.25)
    assert served(at) == [1, 3]
    assert [(request.id, request.overtaken) for request in at.waiting] == [(2, 1)]
    assert at.occupancy.used(0) == (1, 16_384)


def test_one_that_was_overtaken_often_enough_holds_back_those_behind_it():
    at = line(0.5, 1, 0.1, 0.1, 0.1, overtakes=2)
    assert served(at) == [1, 3, 4]
    assert served(at) == []


def test_without_overtaking_it_is_first_come_first_served():
    assert served(line(0.75, 0.5, 0.25, overtakes=0)) == [1]


def test_whoever_does_not_wait_is_not_served():
    assert line(0.5).serve(7) is None

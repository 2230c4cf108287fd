"""The fake backend keeps the protocol, in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prefect_slo.errors import InvalidValue
from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Backend, Bundle, Finished, Lost, Opened, Outcome, Progress, Report
from prefect_slo.testing import FakeBackend, FakeClock

SIZE = Size(2, 1024)


class Doubling:
    def open(self, emit: Callable[[bytes], None]) -> Callable[[int, Any], Outcome]:
        return lambda item, payload: Outcome(2 * payload)


def opened(**options: Any) -> tuple[FakeBackend, FakeClock, list[Report]]:
    clock, reports = FakeClock(), []
    backend: Backend = FakeBackend(clock, **options)
    backend.open(1, SIZE, reports.append)
    return backend, clock, reports


def test_a_bundle_takes_what_its_items_take_one_after_another() -> None:
    backend, clock, reports = opened(start_s=0.5)
    clock.advance(1)
    assert reports == [Opened(1, True, 0.5, 0.0, reports[0].pid)]
    backend.submit(1, Bundle(7, "work", None, ((1, 2.0), (2, 3.0))))
    clock.advance(10)
    ends = [(r.items[0].item, r.items[0].started, r.items[0].ended) for r in reports if isinstance(r, Progress)]
    assert ends == [(1, 1.0, 3.0), (2, 3.0, 6.0)]
    assert reports[-1] == Finished(1, 7, 1.0, 6.0)


def test_programs_are_run_and_their_results_reported() -> None:
    backend, clock, reports = opened(duration=lambda bundle, item, payload: 1.0)
    clock.advance(0)
    backend.submit(1, Bundle(1, "work", Doubling(), ((1, 21),)))
    clock.advance(1)
    assert [r.items[0].outcome.payload for r in reports if isinstance(r, Progress)] == [42]


def test_an_item_past_its_timeout_loses_the_lease_and_what_was_not_started() -> None:
    backend, clock, reports = opened()
    clock.advance(0)
    backend.submit(1, Bundle(3, "work", None, ((1, 1.0), (2, 9.0), (3, 1.0)), timeout_s=5.0))
    clock.advance(60)
    lost = reports[-1]
    assert isinstance(lost, Lost)
    assert (lost.reason, lost.running, lost.untouched, lost.bundle) == ("timeout", 2, (3,), 3)
    assert sum(isinstance(r, (Finished, Lost)) for r in reports) == 1


def test_cancelling_ends_what_runs() -> None:
    backend, clock, reports = opened()
    clock.advance(0)
    backend.submit(1, Bundle(1, "work", None, ((1, 5.0),)))
    clock.advance(1)
    backend.cancel(1)
    clock.advance(10)
    assert [type(r) for r in reports] == [Opened, Lost]
    assert reports[-1].reason == "cancelled"


def test_leases_wait_for_room() -> None:
    backend, clock, reports = opened(vcpus=3.0)
    backend.open(2, SIZE, reports.append)
    clock.advance(1)
    assert [r.lease for r in reports] == [1]
    backend.close(1)
    clock.advance(0)
    assert [(r.lease, r.wait_s) for r in reports] == [(1, 0.0), (2, 1.0)]
    backend.shutdown()
    backend.shutdown()


def test_a_busy_lease_takes_nothing_more() -> None:
    backend, clock, _ = opened()
    clock.advance(0)
    backend.submit(1, Bundle(1, "work", None, ((1, 5.0),)))
    with pytest.raises(InvalidValue):
        backend.submit(1, Bundle(2, "work", None, ((2, 5.0),)))

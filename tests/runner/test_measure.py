"""What a run is measured by: rows of its stages, and what its leases cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prefect_slo.pricing import PriceList
from prefect_slo.resources import Size
from prefect_slo.runner import measure as measuring
from prefect_slo.runner.backends.protocol import Finished, ItemReport, Lost, Opened, Outcome
from prefect_slo.runner.measure import Measure
from prefect_slo.runner.pools import PROCESS

PRICES = PriceList("test", vcpu_second=1.0, gb_second=1.0)
MACHINE, SMALL = Size(4, 8192), Size(1, 1024)


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_760_000_000.0 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(measuring, "time", fake)
    return fake


@pytest.fixture
def runs(clock: Clock) -> Callable[..., Measure]:
    """Runs a stage: each worker is asked for at 0, waits, and works on one item; all leases end with the last."""

    def run(*workers: tuple[float, float], size: Size = SMALL, planned: bool = True, fails: int = 0) -> Measure:
        begun = clock.now
        seen = Measure(PRICES, machine=MACHINE, planned={"train"} if planned else ())
        seen.submitted("train", len(workers), begun)
        ends = [begun + waits + works for waits, works in workers]
        for lease in range(len(workers)):
            seen.leased(lease, "train", PROCESS, size, begun)
        for lease, (waits, _) in sorted(enumerate(workers), key=lambda pair: pair[1]):
            clock.now = begun + waits
            seen.opened(Opened(lease, False, 0.0, waits, 1))
            seen.dispatched(lease, lease, clock.now, begun)
        for lease, (waits, works) in sorted(enumerate(workers), key=lambda pair: ends[pair[0]]):
            clock.now = ends[lease]
            outcome = Outcome(b"", failed=lease < fails)
            seen.item(lease, ItemReport(lease, outcome, begun + waits, clock.now), ready=begun)
            if lease < fails:
                seen.failed("train")
            seen.finished(Finished(lease, lease, begun + waits, clock.now, 0.0, works, 10.0, 0, 0))
        for lease in range(len(workers)):
            seen.released(lease, clock.now)
        return seen

    return run


def row(seen: Measure, workers: int | None = None):
    [only] = seen.stage_runs("run", lambda _: workers)
    return only


def test_waiting_for_capacity_of_other_runs_is_told_apart_from_what_the_stage_took(runs):
    alone, queued = row(runs((0.0, 2.0), (0.0, 2.0))), row(runs((5.0, 2.0), (5.0, 2.0)))
    assert (alone.wall_s, alone.queue_s) == pytest.approx((2.0, 0.0))
    assert (queued.wall_s, queued.queue_s) == pytest.approx((2.0, 5.0))
    assert queued.overhead_s == pytest.approx(alone.overhead_s)


def test_of_workers_that_wait_differently_the_mean_counts(runs):
    found = row(runs((0.0, 3.0), (2.0, 3.0)))
    assert (found.wall_s, found.queue_s) == pytest.approx((4.0, 1.0))


def test_a_start_is_seen_of_a_stage_whose_items_get_ready_after_they_were_submitted(clock):
    seen = Measure(PRICES, machine=MACHINE, planned={"train"})
    seen.submitted("train", 1, None)
    seen.leased(0, "train", PROCESS, SMALL, clock.now)
    begun = clock.now
    clock.now += 6.0  # one second in the queue, five to start; its item is ready after two
    seen.opened(Opened(0, True, 5.0, 1.0, 1))
    seen.dispatched(0, 0, clock.now, begun + 2.0)
    clock.now += 3.0
    seen.item(0, ItemReport(0, Outcome(b"", failed=False), begun + 6.0, clock.now), ready=begun + 2.0)
    seen.finished(Finished(0, 0, begun + 6.0, clock.now))
    only = row(seen)
    assert (only.wall_s, only.queue_s, only.start_s) == pytest.approx((7.0, 0.0, 4.0))
    assert only.cold


def test_a_stage_with_failed_items_has_a_row_and_says_so(runs):
    assert runs((0.0, 1.0), (0.0, 1.0)).failed_items("train") == 0
    seen = runs((0.0, 1.0), (0.0, 1.0), fails=1)
    assert seen.failed_items("train") == 1
    assert row(seen).items == 2


def test_a_stage_that_lost_its_only_worker_has_a_row(clock):
    seen = Measure(PRICES, machine=MACHINE)
    seen.submitted("train", 1, clock.now)
    seen.leased(0, "train", PROCESS, SMALL, clock.now)
    seen.opened(Opened(0, False, 0.0, 0.0, 1))
    clock.now += 3
    seen.lost(Lost(0, "died", "killed by signal 9"))
    seen.failed("train")
    assert seen.failed_items("train") == 2
    assert (row(seen).wall_s, row(seen).items) == (3.0, 0)


def test_a_planned_worker_costs_its_size(runs):
    assert runs((0.0, 2.0), size=Size(2, 2048)).cost_usd == pytest.approx(2.0 * (2 + 2))


def test_a_worker_without_a_plan_costs_its_share_of_the_machine(runs):
    seen = runs((0.0, 2.0), size=Size(1, MACHINE.memory_mb), planned=False)
    assert seen.cost_usd == pytest.approx(2.0 * (1 + 2)), "one of four vCPUs, and a quarter of 8 GB"
    assert row(seen).memory_mb == MACHINE.memory_mb / 4


def test_more_workers_than_the_machine_has_vcpus_cost_the_machine(runs):
    seen = runs(*[(0.0, 2.0)] * 40, size=Size(1, MACHINE.memory_mb), planned=False)
    assert seen.cost_usd == pytest.approx(2.0 * (4 + 8))

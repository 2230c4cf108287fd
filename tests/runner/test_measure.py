"""What a run is measured by: rows of its stages, and what its leases cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from prefect_slo.pricing import PriceList
from prefect_slo.resources import Size
from prefect_slo.runner import measure as measuring
from prefect_slo.runner.backends.protocol import Bundle, Finished, ItemReport, Lost, Opened, Outcome
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


@pytest.mark.parametrize(("pool", "wall_s", "queue_s"), [("cluster", 5.0, 0.0), (PROCESS, 2.0, 3.0)])
def test_waiting_for_stages_of_the_own_run_is_no_waiting_for_other_runs(clock, pool, wall_s, queue_s):
    """On this machine no stage waits for another's vCPUs: the scheduler asks for no more than there are."""
    seen, begun = Measure(PRICES, machine=MACHINE, planned={"load", "train"}), clock.now
    seen.submitted("load", 1, begun)
    seen.submitted("train", 1, begun)
    seen.leased(0, "load", pool, SMALL, begun)
    seen.opened(Opened(0, False, 0.0, 0.0, 1))
    seen.leased(1, "train", pool, SMALL, begun)
    clock.now += 3.0
    seen.released(0, clock.now)
    seen.opened(Opened(1, False, 0.0, 3.0, 1))
    seen.dispatched(1, 1, clock.now, begun)
    clock.now += 2.0
    seen.item(1, ItemReport(1, Outcome(b"", failed=False), begun + 3.0, clock.now), ready=begun)
    seen.finished(Finished(1, 1, begun + 3.0, clock.now))
    only = row(seen)
    assert (only.stage, only.wall_s, only.queue_s) == ("train", pytest.approx(wall_s), queue_s)


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


def mapped(clock: Clock, *openings: tuple[float, Opened], items: int = 2, ready: float = 10.0) -> Measure:
    """A stage that hears when its first item was ready once that has ended; leases are asked for at instants."""
    begun = clock.now
    seen = Measure(PRICES, machine=MACHINE)
    seen.submitted("train", items, None)
    for asked, opened in openings:
        seen.leased(opened.lease, "train", "pool", SMALL, begun + asked)
        clock.now = begun + asked + opened.wait_s + opened.start_s
        seen.opened(opened)
    clock.now = max(clock.now, begun + ready)
    lease = openings[0][1].lease
    for item in range(items):
        started, clock.now = clock.now, clock.now + 1.0
        seen.item(lease, ItemReport(item, Outcome(b""), started, clock.now), ready=begun + ready)
    seen.finished(Finished(lease, 0, clock.now - items, clock.now))
    for _, opened in openings:
        seen.released(opened.lease, clock.now)
    return seen


def test_a_stage_whose_items_are_ready_later_has_waited_for_the_start_of_its_worker_too(clock):
    found = row(mapped(clock, (10.0, Opened(0, True, 4.0, 3.0, 1))))
    assert (found.start_s, found.queue_s, found.wall_s) == pytest.approx((4.0, 3.0, 6.0))
    assert found.cold


def test_a_start_that_was_over_before_there_was_something_to_do_was_not_waited_for(clock):
    found = row(mapped(clock, (2.0, Opened(0, True, 4.0, 3.0, 1))))
    assert (found.start_s, found.queue_s, found.wall_s) == pytest.approx((0.0, 0.0, 2.0))
    assert not found.cold


def test_of_a_start_that_began_before_the_rest_was_waited_for(clock):
    found = row(mapped(clock, (8.0, Opened(0, True, 4.0, 1.0, 1))))
    assert (found.start_s, found.queue_s) == pytest.approx((3.0, 0.0))
    assert found.cold


def test_a_worker_that_comes_when_all_is_done_was_waited_for_until_then(clock):
    seen, begun = Measure(PRICES, machine=MACHINE), clock.now
    seen.submitted("train", 1, None)
    for lease in (0, 1):
        seen.leased(lease, "train", "pool", SMALL, begun)
    seen.opened(Opened(0, False, 0.0, 0.0, 1))
    clock.now = begun + 2.0
    seen.item(0, ItemReport(0, Outcome(b""), begun, clock.now), ready=begun)
    clock.now = begun + 9.0
    seen.opened(Opened(1, True, 9.0, 0.0, 2))
    assert row(seen, workers=2).start_s == pytest.approx(2.0 / 2)


def test_a_start_that_came_with_the_work_was_waited_for_as_well(clock):
    seen = Measure(PRICES, machine=MACHINE)
    seen.submitted("train", 1, clock.now)
    seen.leased(0, "train", "pool", SMALL, clock.now)
    seen.opened(Opened(0, False, 0.0, 0.0, 1))
    begun, clock.now = clock.now, clock.now + 5.0
    seen.item(0, ItemReport(0, Outcome(b""), begun + 3.0, clock.now), ready=begun)
    seen.finished(Finished(0, 0, begun + 3.0, clock.now, init_s=3.0))
    assert (row(seen).start_s, row(seen).wall_s) == pytest.approx((3.0, 5.0))
    assert row(seen).cold


def test_a_lease_elsewhere_costs_what_it_was_held_and_not_what_was_waited_for_it(clock):
    seen = mapped(clock, (10.0, Opened(0, True, 30.0, 100.0, 1, held_s=2.5)))
    assert row(seen).billed_s == pytest.approx(2.5 + 2.0)
    assert seen.cost_usd == pytest.approx((2.5 + 2.0) * (1 + 1))


def on_a_cluster(
    clock: Clock, *bundles: tuple[float, float], until: float, on_new: bool = False, weight: int = 0
) -> Measure:
    """Bundles are dispatched at 0, each on a lease of its own; each has its turn from one instant to another."""
    seen, begun = Measure(PRICES, machine=MACHINE), clock.now
    seen.submitted("train", len(bundles), begun)
    for lease in range(len(bundles)):
        seen.leased(lease, "train", "cluster", SMALL, begun, queues=True)
        seen.opened(Opened(lease, False, 0.0, 0.0, 0))
        seen.dispatched(lease, lease, begun, begun, weight)
    for lease, (began, ended) in sorted(enumerate(bundles), key=lambda pair: pair[1][1]):
        held = began, clock.now = begun + began, begun + ended
        seen.item(lease, ItemReport(lease, Outcome(b""), began, clock.now), ready=begun)
        seen.finished(Finished(lease, lease, began, clock.now, held=held, on_new=on_new))
    clock.now = begun + until
    for lease in range(len(bundles)):
        seen.released(lease, clock.now)
    return seen


def test_on_a_cluster_that_others_fill_a_stage_costs_what_it_held_and_the_queue_is_told_apart(clock):
    seen = on_a_cluster(clock, (5.0, 7.0), (5.0, 8.0), until=20.0)
    assert (row(seen).queue_s, row(seen).wall_s, row(seen).billed_s) == pytest.approx((5.0, 3.0, 2.0 + 3.0))
    assert seen.cost_usd == pytest.approx(5.0 * (1 + 1))
    assert row(seen).requests == 2, "what is paid for is what bundles held, not the wall time of workers"


def test_a_stage_that_was_on_a_cluster_in_part_does_not_say_what_was_paid(clock):
    seen = on_a_cluster(clock, (0.0, 2.0), until=2.0)
    seen.leased(1, "train", PROCESS, SMALL, clock.now)
    seen.opened(Opened(1, False, 0.0, 0.0, 0))
    seen.released(1, clock.now)
    assert math.isnan(row(seen).requests)
    assert math.isnan(row(seen).billed_s)


def test_what_waits_on_a_cluster_for_a_worker_that_starts_is_a_cold_start(clock):
    found = row(on_a_cluster(clock, (5.0, 7.0), (5.0, 8.0), until=8.0, on_new=True))
    assert (found.queue_s, found.start_s, found.wall_s) == pytest.approx((0.0, 5.0, 8.0))
    assert found.cold


@pytest.mark.parametrize(("weight", "queue_s"), [(0, 3.0), (3 * 10**9, 0.0)])
def test_the_way_of_large_arguments_to_a_worker_is_no_queue(clock, weight, queue_s):
    found = row(on_a_cluster(clock, (3.0, 4.0), until=4.0, weight=weight))
    assert (found.queue_s, found.wall_s) == pytest.approx((queue_s, 4.0 - queue_s))


def test_a_bundle_weighs_what_it_brings_and_what_it_takes_from_elsewhere():
    parts = (b"12", SimpleNamespace(size=100))
    assert Bundle(1, "key", b"", ((1, b"123"), (2, b"4567")), parts=parts).weight == 3 + 4 + 2 + 100


def test_what_waits_on_a_cluster_behind_its_own_run_is_the_stages_own_time(clock):
    """However many bundles may be under way: what runs there at once is what the cluster has room for."""
    found = row(on_a_cluster(clock, (0.0, 2.0), (2.0, 4.0), (4.0, 6.0), until=6.0))
    assert (found.queue_s, found.wall_s, found.billed_s) == pytest.approx((0.0, 6.0, 6.0))


def test_the_way_to_a_worker_is_no_queue(clock):
    found = row(on_a_cluster(clock, (0.5, 2.5), until=2.5))
    assert (found.queue_s, found.wall_s, found.billed_s) == pytest.approx((0.0, 2.5, 2.0))


def test_between_its_own_bundles_others_hold_the_cluster(clock):
    found = row(on_a_cluster(clock, (0.0, 2.0), (5.0, 6.0), until=6.0))
    assert (found.queue_s, found.wall_s, found.billed_s) == pytest.approx((3.0 / 2, 6.0 - 3.0 / 2, 3.0))


@pytest.mark.parametrize(("held", "billed_s"), [(None, 3.0), ((1003.0, 1003.0), 0.0), ((1001.0, 1002.5), 1.5)])
def test_a_bundle_that_is_lost_on_a_cluster_has_cost_what_it_held_or_may_have(clock, held, billed_s):
    seen = Measure(PRICES, machine=MACHINE)
    seen.submitted("train", 1, clock.now)
    seen.leased(0, "train", "cluster", SMALL, clock.now, queues=True)
    seen.opened(Opened(0, False, 0.0, 0.0, 0))
    seen.dispatched(0, 7, clock.now, clock.now)
    clock.now += 3.0
    seen.lost(Lost(0, "died", "its worker is gone", bundle=7, held=held))
    assert seen.cost_usd == pytest.approx(billed_s * (1 + 1))


@pytest.mark.parametrize(
    ("no_gpu", "hardware"), [((), "l4"), ((0, 1), "l4-cpu"), ((1,), "l4+l4-cpu"), ((0,), "l4+l4-cpu")]
)
def test_a_stage_counts_for_the_machines_that_its_workers_were_on(clock, no_gpu, hardware):
    """Not for a GPU that was not there; and for neither kind where they were on both."""
    seen, size = Measure(PriceList("test", 1.0, 1.0, gpu_second=100.0), machine=MACHINE), Size(1, 1024, 1, "l4")
    seen.submitted("train", 2, clock.now)
    for lease in (0, 1):
        seen.leased(lease, "train", "pool", size, clock.now)
        seen.opened(Opened(lease, False, 0.0, 0.0, 1, no_gpu=lease in no_gpu))
    begun, clock.now = clock.now, clock.now + 2.0
    for lease in (0, 1):
        seen.dispatched(lease, lease, begun, begun)
        seen.item(lease, ItemReport(lease, Outcome(b""), begun, clock.now), ready=begun)
        seen.finished(Finished(lease, lease, begun, clock.now))
        seen.released(lease, clock.now)
    assert row(seen).hardware == hardware
    assert seen.cost_usd == pytest.approx(2 * 2.0 * (1 + 1) + (2 - len(no_gpu)) * 2.0 * 100.0)

"""Places for shares of GPUs, whichever stages overlap: against every packing of every antichain of random graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import pytest

from prefect_slo.errors import GpuShareTooLarge
from prefect_slo.placement import Device, Occupancy, Share, devices_needed
from prefect_slo.planner import overlap
from prefect_slo.planner.overlap import Order, antichains, heaviest
from prefect_slo.planner.placing import Placing, devices_at_once, surely_fit
from prefect_slo.resources import Capacity, Option, Size

SHARES = (0.125, 0.2, 0.25, 0.3, 0.5, 0.75, 1.0)


def random_order(rng: np.random.Generator, n: int, density: float) -> Order:
    """A transitive order of n stages."""
    closure = {(i, j) for i in range(n) for j in range(i + 1, n) if rng.random() < density}
    for k in range(n):
        closure |= {(i, j) for i in range(n) for j in range(n) if (i, k) in closure and (k, j) in closure}
    return frozenset(closure)


def every_antichain(n: int, order: Order) -> Iterator[tuple[int, ...]]:
    for size in range(1, n + 1):
        for some in combinations(range(n), size):
            if not any(pair in order for pair in combinations(some, 2)):
                yield some


def can_be_placed(shares: Sequence[Share], devices: Sequence[Device]) -> bool:
    """By trying every device for every share."""

    def place(rest: Sequence[Share], held: list[list[Share]]) -> bool:
        if not rest:
            return True
        for at, device in enumerate(devices):
            here = [*held[at], rest[0]]
            alone = len(here) == 1 or all(share.gpu < 1 for share in here)
            cores, memory_mb = sum(s.cores for s in here), sum(s.memory_on(device) for s in here)
            fits = alone and cores <= device.cores + 1e-9 and memory_mb <= device.memory_mb * (1 + 1e-9)
            if fits and place(rest[1:], [*held[:at], here, *held[at + 1 :]]):
                return True
        return False

    return place(sorted(shares, reverse=True), [[] for _ in devices])


def option(workers: int, share: Share) -> Option:
    return Option(workers, Size(1, 1024, share.gpu, "gpu", int(share.memory_mb)))


def random_case(rng: np.random.Generator) -> tuple[list[Option], Order, tuple[Device, ...]]:
    n = int(rng.integers(2, 6))
    devices = tuple(
        Device(str(k), float(rng.choice([8_192, 16_384])), float(rng.choice([0.5, 1.0, 1.0, 1.0])))
        for k in range(int(rng.integers(1, 4)))
    )
    options = [
        option(int(rng.integers(1, 3)), Share(float(rng.choice(SHARES)), float(rng.choice([0, 0, 2_000, 5_000]))))
        for _ in range(n)
    ]
    return options, random_order(rng, n, float(rng.uniform(0.2, 0.8))), devices


@pytest.mark.parametrize("listed", [256, 1])
def test_what_is_admitted_can_be_placed_whichever_stages_overlap(listed, monkeypatch):
    """With all sets of stages listed, and by the bounds that hold where they are too many."""
    monkeypatch.setattr(overlap, "LISTED", listed)
    rng = np.random.default_rng(11)
    admitted = refused = possible = 0
    for _ in range(600):
        options, order, devices = random_case(rng)
        capacity = Capacity(gpu_devices=devices)
        placing = Placing.of(order, capacity, [[each] for each in options])
        assert placing is not None
        fits = all(
            can_be_placed([share for i in some for share in [options[i].size.share] * options[i].workers], devices)
            for some in every_antichain(len(options), order)
        )
        possible += fits
        if placing.admits([0] * len(options)):
            admitted += 1
            assert fits, (options, order, devices)
        else:
            refused += 1
    assert refused > 100
    assert admitted > (0.9 if listed > 1 else 0.6) * possible, "bounds that refuse nearly everything are of no use"


def test_bounds_are_exact_for_halves_quarters_and_wholes():
    rng = np.random.default_rng(12)
    devices = tuple(Device(str(k), 16_384) for k in range(2))
    both = set()
    for _ in range(200):
        n = int(rng.integers(2, 6))
        options = [option(int(rng.integers(1, 4)), Share(float(rng.choice([0.125, 0.25, 0.5, 1])))) for _ in range(n)]
        order = random_order(rng, n, 0.4)
        fits = all(
            can_be_placed([share for i in some for share in [options[i].size.share] * options[i].workers], devices)
            for some in every_antichain(n, order)
        )
        assert surely_fit(options, order, devices) == fits
        both.add(fits)
    assert both == {True, False}


def wide(n: int) -> Order:
    """n pairs of stages, one after the other: 2ⁿ largest sets of stages that can overlap."""
    return frozenset((2 * k, 2 * k + 1) for k in range(n))


def test_beyond_the_list_nothing_is_admitted_that_has_no_place():
    n = 12
    order = wide(n)
    assert not antichains(range(2 * n), order)[1]
    devices = tuple(Device(str(k), 16_384) for k in range(8))
    menu = [[option(1, Share(gpu)) for gpu in (0.5, 0.75)] for _ in range(2 * n)]
    placing = Placing.of(order, Capacity(gpu_devices=devices), menu)
    assert placing is not None
    assert placing.admits([0] * (2 * n)), "12 halves at once on 8 devices"
    assert not placing.admits([1] * (2 * n)), "12 times three quarters, which add up to 9"
    eight_at_once = [1 if pair < 4 else 0 for pair in range(n) for _ in range(2)]
    assert placing.admits(eight_at_once), "4 of three quarters on a device each, 8 halves on the other 4"
    assert not placing.admits([1 if pair < 5 else 0 for pair in range(n) for _ in range(2)])


def test_stages_without_a_gpu_make_no_list_too_long():
    """Only stages that take of a device are looked at: a wide graph with two of them is exact."""
    n = 12
    cpu, gpu = Option(1, Size(1, 1024)), option(1, Share(0.75))
    menu = [[gpu, cpu] if stage in (0, 2) else [cpu] for stage in range(2 * n)]
    placing = Placing.of(wide(n), Capacity(gpu_devices=(Device("0", 16_384),)), menu)
    assert placing is not None
    assert not placing.admits([0] * (2 * n))
    assert placing.admits([1, *[0] * (2 * n - 1)])


def test_devices_at_once_is_the_peak_and_not_the_sum():
    device = Device("0", 16_384)
    half, whole = option(2, Share(0.5)), option(1, Share(2))
    assert devices_at_once([half, half, whole], frozenset({(0, 1), (0, 2), (1, 2)}), device) == 2
    assert devices_at_once([half, half, whole], frozenset(), device) == 4
    assert devices_at_once([Option(3, Size(1, 1024))], frozenset(), device) == 0
    with pytest.raises(GpuShareTooLarge):
        devices_at_once([option(1, Share(0.5, 20_000))], frozenset(), device)


def test_beyond_the_list_devices_are_counted_by_a_bound(monkeypatch):
    rng = np.random.default_rng(13)
    device = Device("0", 16_384)
    for _ in range(100):
        n = int(rng.integers(2, 7))
        options = [option(int(rng.integers(1, 4)), Share(float(rng.choice(SHARES)))) for _ in range(n)]
        order = random_order(rng, n, 0.4)
        exact = max(
            devices_needed([s for i in some for s in [options[i].size.share] * options[i].workers], device)
            for some in every_antichain(n, order)
        )
        monkeypatch.setattr(overlap, "LISTED", 256)
        assert devices_at_once(options, order, device) == exact
        monkeypatch.setattr(overlap, "LISTED", 0)
        bound = devices_at_once(options, order, device)
        cores = heaviest([o.workers * o.size.gpu for o in options], order)
        assert cores - 1e-9 <= bound <= 2 * cores + 1
        assert bound >= exact or can_be_placed_on(bound, options, order, device)


def can_be_placed_on(count: int, options: Sequence[Option], order: Order, device: Device) -> bool:
    """Whether so many devices do after all, where first-fit-decreasing has taken more than the bound says."""
    return all(
        can_be_placed([s for i in some for s in [options[i].size.share] * options[i].workers], (device,) * count)
        for some in every_antichain(len(options), order)
    )


def test_packing_by_hand_agrees_with_what_devices_hold():
    """The brute force of this module against the product's own count of one device."""
    rng = np.random.default_rng(14)
    device = (Device("0", 16_384),)
    for _ in range(200):
        shares = [Share(float(rng.choice(SHARES)), float(rng.choice([0, 4_000]))) for _ in range(3)]
        occupancy, placed = Occupancy(device), True
        for share in shares:
            placed = placed and occupancy.find(share) is not None
            if placed:
                occupancy.put(share, (0,))
        assert can_be_placed(shares, device) == placed

"""Shares of GPUs on devices: capacity, packing, refusal, interference."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from prefect_slo.errors import GpuShareTooLarge, InvalidValue
from prefect_slo.placement import Device, Interference, Occupancy, Share, check, devices_needed, most_at_once, pack

SEQUENCES = pytest.mark.parametrize("sequences", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
TWO = (Device("0", 16_384), Device("1", 16_384))


def test_a_share_never_spans_two_devices():
    occupancy = Occupancy(TWO)
    for at in ((0,), (1,)):
        assert occupancy.find(Share(0.75), "first") == at
        occupancy.put(Share(0.75), at)
    assert occupancy.find(Share(0.5)) is None
    assert occupancy.find(Share(0.25)) is not None


def test_best_fit_leaves_the_emptier_device_for_what_is_large():
    occupancy = Occupancy(TWO)
    occupancy.put(Share(0.5), (1,))
    assert occupancy.find(Share(0.25), "best") == (1,)
    assert occupancy.find(Share(0.25), "first") == (0,)


def test_memory_binds_like_cores():
    occupancy = Occupancy(TWO[:1])
    occupancy.put(Share(0.1, 12_000), (0,))
    assert occupancy.find(Share(0.1, 5_000)) is None
    assert occupancy.find(Share(0.9, 4_000)) == (0,)


def test_memory_that_is_not_said_is_the_part_of_the_cores():
    assert Share(0.25).memory_on(TWO[0]) == 4_096
    assert most_at_once(Share(0.25), TWO) == 8


def test_whole_devices_are_taken_empty_and_kept_alone():
    occupancy = Occupancy(TWO)
    occupancy.put(Share(0.1), (0,))
    assert occupancy.find(Share(1)) == (1,)
    assert occupancy.find(Share(2)) is None
    occupancy.put(Share(1), (1,))
    assert occupancy.find(Share(0.95)) is None


@pytest.mark.parametrize("share", [Share(0.5, 16_385), Share(3)])
def test_what_fits_no_device_is_refused_and_not_cut_down(share):
    with pytest.raises(GpuShareTooLarge, match="16,384 MB") as refused:
        check(share, TWO)
    assert refused.value.devices == tuple(map(str, TWO))


def test_memory_is_that_of_one_device_and_not_of_all():
    with pytest.raises(GpuShareTooLarge):
        check(Share(0.5, 20_000), TWO)


def test_without_devices_the_error_says_so():
    with pytest.raises(GpuShareTooLarge, match="there is no GPU here"):
        check(Share(0.5), ())


@pytest.mark.parametrize("gpu", [0, -0.5, 1.5, float("nan")])
def test_shares_are_fractions_or_whole_devices(gpu):
    with pytest.raises(InvalidValue):
        Share(gpu)


def test_equal_shares_on_unequal_devices_are_counted_by_device():
    devices = (Device("0", 16_384), Device("1", 4_096), Device("2", 16_384, cores=0.5))
    assert most_at_once(Share(0.25, 4_096), devices) == 4 + 1 + 2
    assert most_at_once(Share(2, 0), devices) == 1
    assert most_at_once(Share(0.25, 20_000), devices) == 0


def test_counting_and_packing_agree_on_equal_shares():
    rng = np.random.default_rng(5)
    for _ in range(300):
        devices = tuple(
            Device(str(k), float(rng.integers(4, 40)) * 1_024, float(rng.choice([0.5, 1.0]))) for k in range(3)
        )
        share = Share(float(rng.choice([0.1, 0.2, 0.25, 0.3, 0.5])), float(rng.choice([0, 2_000, 9_000])))
        most = most_at_once(share, devices)
        assert pack([share] * most, devices) is not None
        assert pack([share] * (most + 1), devices) is None


def test_packing_holds_no_device_beyond_what_it_has():
    rng = np.random.default_rng(6)
    packed = 0
    for _ in range(1_000):
        devices = tuple(Device(str(k), float(rng.integers(8, 80)) * 1_024) for k in range(int(rng.integers(1, 5))))
        shares = [Share(float(rng.uniform(0.05, 1)), float(rng.uniform(0, 8_192))) for _ in range(rng.integers(1, 9))]
        placed = pack(shares, devices)
        if placed is None:
            continue
        packed += 1
        assert_within(devices, list(zip(shares, placed, strict=True)))
    assert packed > 300


@SEQUENCES
def test_first_fit_decreasing_keeps_its_bound_where_one_resource_binds(sequences):
    """Devices cut into shares without waste: the cut is the best packing, and it is known."""
    rng = np.random.default_rng(7)
    device, worst = Device("0", 16_384), 0.0
    for _ in range(sequences):
        best = int(rng.integers(1, 9))
        shares = [Share(part) for _ in range(best) for part in cut(rng)]
        rng.shuffle(shares)
        needed = devices_needed(shares, device)
        assert best <= needed <= 11 / 9 * best + 6 / 9 + 1e-9
        worst = max(worst, needed / best)
    assert worst > 1  # else the instances would be too easy to show anything


@SEQUENCES
def test_first_fit_decreasing_keeps_its_bound_where_two_resources_bind(sequences):
    rng = np.random.default_rng(8)
    device = Device("0", 16_384)
    for _ in range(sequences):
        best = int(rng.integers(1, 5))
        shares = []
        for _ in range(best):
            cores = cut(rng)
            memory = rng.dirichlet(np.ones(len(cores))) * device.memory_mb * (1 - 1e-9)
            shares += [Share(c, max(float(m), 1e-6)) for c, m in zip(cores, memory, strict=True)]
        assert devices_needed(shares, device) <= 7 / 3 * best + 1


def test_first_fit_decreasing_against_every_packing_of_small_instances():
    rng = np.random.default_rng(9)
    device = Device("0", 1_000)
    compared = 0
    for _ in range(60):
        shares = [Share(float(rng.uniform(0.1, 0.8)), float(rng.uniform(50, 800))) for _ in range(5)]
        packings = (
            len(set(where))
            for where in product(range(4), repeat=5)
            if all(
                sum(s.gpu for s, w in zip(shares, where, strict=True) if w == k) <= 1
                and sum(s.memory_mb for s, w in zip(shares, where, strict=True) if w == k) <= 1_000
                for k in set(where)
            )
        )
        if (best := min(packings, default=None)) is not None:
            compared += 1
            assert best <= devices_needed(shares, device) <= 7 / 3 * best + 1
    assert compared > 30


def test_interference_is_neutral_until_it_is_measured():
    assert Interference().of(4) == Interference().at(0.25) == 1.0


def test_interference_lies_between_what_was_measured_and_goes_on_beyond():
    measured = Interference({1: 1.0, 2: 2.0, 4: 5.0})
    assert measured.of(3) == pytest.approx(3.5)
    assert measured.at(0.25) == pytest.approx(5.0)
    assert measured.at(0.2) == pytest.approx(6.5)
    assert measured.at(1) == measured.at(0) == 1.0


@pytest.mark.parametrize("slowdown", [{2: 0.5}, {0: 1.0}, {2: 3.0, 3: 2.0}])
def test_interference_that_makes_work_faster_is_refused(slowdown):
    with pytest.raises(InvalidValue, match="slowdown"):
        Interference(slowdown)


def cut(rng: np.random.Generator) -> list[float]:
    """A whole device in parts of whole percents."""
    points = np.sort(rng.choice(np.arange(1, 100), size=int(rng.integers(0, 6)), replace=False))
    return [float(part) / 100 for part in np.diff([0, *points, 100]) if part < 100] or [0.5, 0.5]


def assert_within(devices, placed):
    for position, device in enumerate(devices):
        here = [share for share, at in placed if position in at]
        assert sum(share.cores for share in here) <= device.cores + 1e-9
        assert sum(share.memory_on(device) for share in here) <= device.memory_mb * (1 + 1e-9)

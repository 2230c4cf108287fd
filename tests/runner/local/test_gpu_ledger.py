"""Shares of a machine's GPUs across its processes: never more than a device has, and never lost with one that dies."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from prefect_slo.errors import GpuShareTooLarge
from prefect_slo.placement import Device, Share
from prefect_slo.runner.local.book import FileBook, MemoryBook
from prefect_slo.runner.local.gpu_ledger import GpuClaim, GpuLedger

TWO = (Device("GPU-a", 16384), Device("GPU-b", 16384))


@pytest.fixture(params=["file", "memory"])
def book(request, tmp_path):
    return FileBook(tmp_path / "gpus.json") if request.param == "file" else MemoryBook()


def test_two_runs_never_overfill_a_device(book):
    one, other = GpuLedger(TWO, book), GpuLedger(TWO, book)
    claims = [one.claim(Share(0.75)), other.claim(Share(0.75)), one.claim(Share(0.5))]
    assert [claim.granted for claim in claims] == [True, True, False]
    assert {claim.devices[0].name for claim in claims[:2]} == {"GPU-a", "GPU-b"}
    assert other.used() == {"GPU-a": (0.75, 12288), "GPU-b": (0.75, 12288)}
    one.release(claims[0])
    assert one.retry(claims[2])


def test_overtaking_is_bounded_across_processes(book):
    one, other = GpuLedger(TWO[:1], book, overtakes=2), GpuLedger(TWO[:1], book, overtakes=2)
    held, large = one.claim(Share(0.5)), other.claim(Share(1))
    small = [one.claim(Share(0.1)) for _ in range(3)]
    assert [claim.granted for claim in (held, large, *small)] == [True, False, True, True, False]
    for claim in (held, *small[:2]):
        one.release(claim)
    assert not one.retry(small[2])
    assert other.retry(large)


def test_whoever_waits_for_other_devices_holds_nobody_up(book):
    left, right = GpuLedger(TWO[:1], book, overtakes=0), GpuLedger(TWO[1:], book, overtakes=0)
    left.claim(Share(1))
    assert not left.claim(Share(1)).granted
    assert right.claim(Share(1)).granted


def test_a_share_on_devices_that_are_seen_in_part_counts_on_these(book):
    GpuLedger(TWO, book).claim(Share(2))
    assert not GpuLedger(TWO[1:], book).claim(Share(0.1)).granted


def test_what_no_device_could_hold_is_refused_and_leaves_no_trace(book):
    ledger = GpuLedger(TWO, book)
    with pytest.raises(GpuShareTooLarge):
        ledger.claim(Share(0.5, 20_000))
    assert ledger.claim(Share(1)).granted


def test_releasing_twice_frees_nothing_of_anyone_else(book):
    ledger = GpuLedger(TWO[:1], book)
    one, other = ledger.claim(Share(0.5)), ledger.claim(Share(0.5))
    ledger.release(one)
    ledger.release(one)
    assert ledger.used() == {"GPU-a": (0.5, 8192)}
    assert other.granted


def test_a_damaged_file_is_begun_anew(tmp_path):
    path = tmp_path / "gpus.json"
    ledger = GpuLedger(TWO[:1], FileBook(path))
    ledger.claim(Share(0.75))
    waiting = ledger.claim(Share(0.5))
    path.write_text("{ not a book")
    assert ledger.retry(waiting)


HOLDER = """
import sys, time
from pathlib import Path
from prefect_slo.placement import Device, Share
from prefect_slo.runner.local.book import FileBook
from prefect_slo.runner.local.gpu_ledger import GpuLedger
ledger = GpuLedger([Device("GPU-a", 16384)], FileBook(Path(sys.argv[1])))
claims = [ledger.claim(Share(float(gpu))) for gpu in sys.argv[2:]]
print(*[claim.granted for claim in claims], flush=True)
time.sleep(600)
"""


def test_what_a_killed_process_held_and_waited_for_is_taken_back(tmp_path):
    path = tmp_path / "gpus.json"
    ledger = GpuLedger(TWO[:1], FileBook(path), overtakes=0)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), "0.75", "1"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "True False\n"
        claim = ledger.claim(Share(0.5))
        assert not claim.granted
        holder.kill()
        holder.wait()
        assert ledger.retry(claim)
        assert ledger.used() == {"GPU-a": (0.5, 8192)}
    finally:
        holder.kill()
        holder.wait()


def test_threads_that_claim_and_release_at_once_never_exceed_a_device(book):
    ledger, most, errors = GpuLedger(TWO, book), [], []

    def use(gpu: float) -> None:
        try:
            for _ in range(20):
                claim = ledger.claim(Share(gpu))
                while not ledger.retry(claim):
                    pass
                most.append(max(cores for cores, _ in ledger.used().values()))
                ledger.release(claim)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(gpu,)) for gpu in (0.3, 0.5, 0.75, 1.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(most) == 80
    assert max(most) <= 1 + 1e-9
    assert ledger.used() == {"GPU-a": (0, 0), "GPU-b": (0, 0)}


@pytest.mark.parametrize("sequences", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_capacity_holds_and_everyone_is_served_under_random_load(sequences):
    """Claims come and go at random; those that wait ask again in any order, as processes do."""
    rng = np.random.default_rng(2026)
    granted = overtaken = 0
    for _ in range(sequences):
        ledger, overtakes = random_ledger(rng)
        claims: list[GpuClaim] = []  # in order of arrival; those that were given back are left out
        served: set[int] = set()
        passed: Counter[int] = Counter()
        events = int(rng.integers(8, 20))
        for step in range(10_000):
            asking = range(len(claims))
            if step < events and rng.random() < 0.65:
                try:
                    claims.append(ledger.claim(random_share(rng)))
                except GpuShareTooLarge:
                    continue
                asking = range(len(claims) - 1, len(claims))
            elif held := [claim for claim in claims if claim.granted]:
                gone = held[int(rng.integers(len(held)))]
                ledger.release(gone)
                claims = [claim for claim in claims if claim is not gone]
                asking = range(len(claims))
            for k in rng.permutation(asking):
                if ledger.retry(claims[k]) and claims[k].id not in served:
                    served.add(claims[k].id)
                    passed.update(other.id for other in claims[:k] if not other.granted)
            assert_nothing_is_overfilled(ledger, [claim for claim in claims if claim.granted])
            waiting = [claim for claim in claims if not claim.granted]
            assert not waiting or len(waiting) < len(claims), "somebody waits while every device is empty"
            if step >= events and not waiting:
                break
        assert not waiting, "somebody was never served"
        granted += len(served)
        overtaken += sum(passed.values())
        assert max(passed.values(), default=0) <= overtakes
    assert granted > sequences
    assert overtaken > sequences / 10


def random_ledger(rng: np.random.Generator) -> tuple[GpuLedger, int]:
    devices = tuple(
        Device(str(k), float(rng.choice([8_192, 16_384, 81_920])), float(rng.choice([0.5, 1.0, 1.0])))
        for k in range(int(rng.integers(1, 4)))
    )
    overtakes = int(rng.integers(0, 5))
    return GpuLedger(devices, MemoryBook(), overtakes=overtakes), overtakes


def random_share(rng: np.random.Generator) -> Share:
    gpu = float(rng.integers(1, 3)) if rng.random() < 0.15 else float(rng.choice([0.05, 0.1, 0.25, 0.3, 0.5, 0.75]))
    return Share(gpu, float(rng.choice([0, 0, 1_000, 6_000, 12_000])))


def assert_nothing_is_overfilled(ledger: GpuLedger, held: list[GpuClaim]) -> None:
    """Added up anew from the claims that were granted, not from the account's own counters."""
    for device in ledger.devices:
        here = [claim.share for claim in held if device in claim.devices]
        assert sum(share.cores for share in here) <= device.cores + 1e-9
        assert sum(share.memory_on(device) for share in here) <= device.memory_mb * (1 + 1e-9)
        assert len(here) <= 1 or all(share.gpu < 1 for share in here)

"""Workers with a share of a GPU: what they see, that no device is overfilled, and that their share outlives none."""

from __future__ import annotations

import os
import threading
import time

import pytest

from prefect_slo.placement import Device
from prefect_slo.resources import Size
from prefect_slo.runner.backends.processes import ProcessBackend
from prefect_slo.runner.backends.protocol import Lost, Opened
from prefect_slo.runner.local import gpus as machine
from prefect_slo.runner.local import seating
from prefect_slo.runner.local.book import FileBook
from prefect_slo.runner.local.gpu_ledger import GpuLedger
from prefect_slo.runner.local.probe import Probe

TWO = (Device("GPU-a", 16384), Device("GPU-b", 16384))
HALF = Size(0.5, 300, 0.5, "gpu")


@pytest.fixture
def gpus(tmp_path):
    return GpuLedger(TWO, FileBook(tmp_path / "gpus.json"))


@pytest.fixture
def desk(desk_on, ledger, gpus, start):
    return desk_on(ProcessBackend(ledger=ledger, gpus=gpus, start=start))


def seen(_):
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("PREFECT_SLO_GPU_MEMORY_FRACTION"), os.getpid()


def test_a_worker_sees_the_device_that_it_is_placed_on(desk, gpus):
    whole = desk.open(Size(0.5, 300, 1, "gpu"))
    part = desk.open(HALF)
    assert desk.run(whole, seen)[0][0] == "GPU-a"
    assert desk.run(part, seen)[0][:2] == ("GPU-b", "0.5000")
    assert gpus.used() == {"GPU-a": (1, 16384), "GPU-b": (0.5, 8192)}


def test_a_worker_without_a_share_is_told_nothing(desk, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert desk.run(desk.open(), seen)[0][:2] == (None, None)


def test_the_share_is_given_back_when_the_process_has_ended_and_not_before(desk, gpus, eventually):
    lease = desk.open(HALF)
    pid = desk.run(lease, seen)[0][2]
    desk.backend.close(lease)
    eventually(lambda: gpus.used()["GPU-a"] == (0, 0))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_worker_is_warm_for_a_gpu_and_none_of_a_gpu_for_others(desk, eventually):
    plain = desk.open()
    warm = desk.run(plain, seen)[0][2]
    desk.backend.close(plain)
    first = desk.open(HALF)
    assert desk.opened(first).cold
    pid = desk.run(first, seen)[0][2]
    assert pid != warm
    desk.backend.close(first)
    eventually(lambda: pid not in desk.backend.pids)
    assert desk.opened(desk.open(HALF)).cold


def test_one_that_waits_for_a_gpu_holds_up_nobody_else(desk):
    holders = [desk.open(Size(0.5, 300, 1, "gpu")) for _ in TWO]
    waiting = desk.ask(HALF)
    assert desk.run(desk.open(), lambda payload: payload, [7]) == [7]
    assert not any(isinstance(report, Opened) and report.lease == waiting for report in desk.reports)
    desk.backend.close(holders[0])
    assert desk.opened(waiting).wait_s > 0


def test_whoever_waits_can_be_cancelled(desk, gpus, eventually):
    holders = [desk.open(Size(0.5, 300, 1, "gpu")) for _ in TWO]
    waiting = desk.ask(HALF)
    desk.backend.cancel(waiting)
    assert desk.lost(waiting).reason == "cancelled"
    for holder in holders:
        desk.backend.close(holder)
    eventually(lambda: gpus.used() == {"GPU-a": (0, 0), "GPU-b": (0, 0)})


def test_a_killed_worker_gives_its_share_back(desk, gpus, eventually):
    lease = desk.open(HALF)
    desk.submit(lease, lambda payload: time.sleep(60))
    desk.backend.cancel(lease)
    assert isinstance(desk.lost(lease), Lost)
    eventually(lambda: gpus.used()["GPU-a"] == (0, 0))


def test_what_no_device_here_could_hold_is_refused_at_once_and_says_why(desk):
    lost = desk.lost(desk.ask(Size(0.5, 300, 0.5, "gpu", gpu_memory_mb=20_000)))
    assert lost.reason == "start"
    assert "20,000 MB" in lost.detail
    assert "GPU-a with 16,384 MB" in lost.detail


def test_a_machine_without_a_gpu_says_so(desk_on, ledger, tmp_path):
    desk = desk_on(ProcessBackend(ledger=ledger, gpus=GpuLedger((), FileBook(tmp_path / "none.json"))))
    assert "there is no GPU here" in desk.lost(desk.ask(HALF)).detail


def test_devices_can_be_named_by_hand(desk_on, ledger, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    desk = desk_on(ProcessBackend(ledger=ledger, gpu_devices=["3:8192"]))
    assert desk.run(desk.open(HALF), seen)[0][0] == "3"


def test_two_backends_share_the_devices(desk_on, ledger, tmp_path):
    one, other = (
        desk_on(ProcessBackend(ledger=ledger, gpus=GpuLedger(TWO[:1], FileBook(tmp_path / "shared.json"))))
        for _ in range(2)
    )
    lease = one.open(Size(0.5, 300, 0.75, "gpu"))
    waiting = other.ask(HALF)
    assert one.run(lease, lambda payload: payload, [1]) == [1]
    assert not other.reports
    one.backend.close(lease)
    assert other.opened(waiting).wait_s > 0


def test_with_the_backend_everything_is_given_back(desk, gpus):
    desk.run(desk.open(HALF), seen)
    desk.ask(Size(0.5, 300, 2, "gpu"))
    desk.backend.shutdown()
    assert gpus.used() == {"GPU-a": (0, 0), "GPU-b": (0, 0)}


def percentage(_):
    return os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")


@pytest.fixture
def daemon(monkeypatch):
    """An MPS control daemon that answers when it is let go; that it was asked, and a clock for whoever waits for it."""
    asked, let_go, clock = threading.Event(), threading.Event(), [0.0]

    def ask():
        asked.set()
        let_go.wait(60)
        return "mps"

    probe = Probe("daemon", ask, "turns", "they take turns", timeout_s=5, keep_s=30, clock=lambda: clock[0])
    monkeypatch.setattr(machine, "_SHARING", probe)
    yield asked, let_go, clock
    let_go.set()


def test_an_mps_daemon_that_is_slow_to_answer_holds_up_nobody_else(desk, daemon):
    _, let_go, _ = daemon
    waiting = desk.ask(HALF)
    assert desk.run(desk.open(), lambda payload: payload, [7]) == [7]
    assert desk.opened(desk.open(Size(0.5, 300, 1, "gpu"))).cold, "whole devices are held to nothing"
    assert not any(isinstance(report, Opened) and report.lease == waiting for report in desk.reports)
    let_go.set()
    desk.opened(waiting)
    assert desk.run(waiting, percentage) == ["50"]


def test_an_mps_daemon_that_hangs_is_done_without(desk, daemon):
    asked, _, clock = daemon
    waiting = desk.ask(HALF)
    assert asked.wait(30)
    clock[0] = 6.0
    desk.opened(waiting)
    assert desk.run(waiting, percentage) == [None]
    assert desk.run(desk.open(HALF), percentage) == [None]


class Shaky(GpuLedger):
    """An account whose file can't be opened now and then: every other time that it is asked."""

    def __init__(self, devices, book):
        super().__init__(devices, book)
        self.refused = 0
        self._fails = True

    def _shake(self):
        self._fails = not self._fails
        if not self._fails:
            self.refused += 1
            raise OSError(24, "too many open files")

    def claim(self, share):
        self._shake()
        return super().claim(share)

    def retry(self, claim):
        self._shake()
        return super().retry(claim)

    def release(self, claim):
        self._shake()
        super().release(claim)


def test_an_account_that_cannot_be_asked_for_a_while_costs_waiting_alone(
    desk_on, ledger, tmp_path, eventually, monkeypatch
):
    monkeypatch.setattr(seating, "_AGAIN_S", 0.05)
    gpus = Shaky(TWO[:1], FileBook(tmp_path / "gpus.json"))
    desk = desk_on(ProcessBackend(ledger=ledger, gpus=gpus))
    leases = [desk.open(HALF) for _ in range(2)]
    assert {desk.run(lease, seen)[0][0] for lease in leases} == {"GPU-a"}
    for lease in leases:
        desk.backend.close(lease)
    eventually(lambda: gpus.used()["GPU-a"] == (0, 0))
    assert gpus.refused >= 4

"""GPUs of pilots: shares of devices that jobs of a machine have in common, and devices that a job was given alone."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from prefect_slo.placement import Device
from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Bundle, Finished, Opened, Outcome, Progress, Report
from prefect_slo.runner.local.gpu_ledger import GpuLedger
from prefect_slo.runner.workpool.mailbox import FROM_JOB, TO_JOB, Incoming, Outgoing
from prefect_slo.runner.workpool.pilot import CLOSED, Order, Pilot
from prefect_slo.runner.workpool.stores import FolderStore

PATIENCE_S = 60.0
HALF = Size(0.5, 300, 0.5, "gpus")
DEVICE = Device("GPU-x", 16_384)


class Looks:
    """A program whose items are names of environment variables, and whose results are what its worker finds there."""

    def open(self, emit: object) -> Callable[[int, bytes], Outcome]:
        return lambda item, payload: Outcome(cloudpickle.dumps(os.environ.get(cloudpickle.loads(payload))))


class Job:
    """A pilot that runs in a thread, and its mailbox."""

    def __init__(self, store: FolderStore, box: str, size: Size, *, places_gpus: bool, idle_s: float) -> None:
        terms = {"idle_s": idle_s, "lifetime_s": 600.0, "heartbeat_s": 60.0, "silent_s": 600.0}
        order = Order(store.reference, box, "office", asdict(size), places_gpus=places_gpus, **terms)
        self._out, self._in = Outgoing(store, box, TO_JOB), Incoming(store, box, FROM_JOB)
        self.reports: list[Report] = []
        self.letters = 0
        self.ended = ""
        self._thread = threading.Thread(target=self._serve, args=(order,))
        self._thread.start()

    def _serve(self, order: Order) -> None:
        self.ended = Pilot(order).serve()

    def read(self) -> list[Report]:
        while (letter := self._in.receive()) is not None:
            self.reports += letter.reports
            self.letters += 1
        return self.reports

    def wait_for(self, kind: type) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := [report for report in self.read() if isinstance(report, kind)]):
            assert time.monotonic() < deadline, f"no {kind.__name__}"
            time.sleep(0.01)
        return found[-1]

    def environment(self, *names: str) -> list[str | None]:
        """What its worker finds in its environment."""
        opened = self.wait_for(Opened)
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        items = tuple((at, cloudpickle.dumps(name)) for at, name in enumerate(names))
        self._out.send(("run", opened.lease, Bundle(1, "looks", cloudpickle.dumps(Looks()), items)))
        self.wait_for(Finished)
        found = [item for report in self.reports if isinstance(report, Progress) for item in report.items]
        return [cloudpickle.loads(item.outcome.payload) for item in found]

    def close(self) -> None:
        if self._thread.is_alive():
            self._out.send(("close",))
            self._thread.join(PATIENCE_S)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts pilots on a machine with one device."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_GPU_DEVICES", "GPU-x:16384")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-y")
    store, made = FolderStore(str(tmp_path / "mailboxes")), list[Job]()

    def start(size: Size = HALF, *, places_gpus: bool = True, idle_s: float = 600.0) -> Job:
        made.append(Job(store, f"pilot-{len(made)}", size, places_gpus=places_gpus, idle_s=idle_s))
        return made[-1]

    yield start
    for one in made:
        one.close()


def test_jobs_on_one_machine_have_one_account_of_its_gpus(job: Callable[..., Job]) -> None:
    first, second = job(), job()
    for one in (first, second):
        assert one.environment("CUDA_VISIBLE_DEVICES", "PREFECT_SLO_GPU_MEMORY_FRACTION") == ["GPU-x", "0.5000"]
        assert not one.wait_for(Opened).no_gpu
    assert GpuLedger((DEVICE,)).used() == {"GPU-x": (1, 16_384)}
    third = job()
    first.close()
    assert first.ended == CLOSED
    assert third.wait_for(Opened).wait_s > 0, "there was no room for three halves"
    for one in (second, third):
        one.close()
    assert GpuLedger((DEVICE,)).used() == {"GPU-x": (0, 0)}


def test_a_job_that_waits_for_its_share_says_that_it_is_up_and_does_not_idle(job: Callable[..., Job]) -> None:
    first = job(Size(0.5, 300, 1, "gpus"))
    first.wait_for(Opened)
    second = job(idle_s=0.3)
    deadline = time.monotonic() + PATIENCE_S
    while not (second.read() or second.letters):
        assert time.monotonic() < deadline, "it says nothing"
        time.sleep(0.01)
    second._thread.join(1.0)
    assert not second.ended, "it has done nothing for longer than it may idle, but to wait"
    assert not second.read()
    first.close()
    second.wait_for(Opened)
    second._thread.join(PATIENCE_S)
    assert second.ended == "nothing came for 0.3 s"


def test_a_job_that_was_given_gpus_of_its_own_shows_its_worker_those(job: Callable[..., Job]) -> None:
    alone = job(Size(0.5, 300, 1, "gpus"), places_gpus=False)
    assert alone.environment("CUDA_VISIBLE_DEVICES", "PREFECT_SLO_GPU_SHARE") == ["GPU-y", "1"]
    assert GpuLedger((DEVICE,)).used() == {"GPU-x": (0, 0)}


def test_a_job_on_a_machine_without_one_runs_on_the_cpu_and_says_so(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_GPU_DEVICES", "none")
    without = job()
    assert without.environment("PREFECT_SLO_GPU_SHARE") == [None]
    assert without.wait_for(Opened).no_gpu
    assert "there is no GPU here: it runs on the CPU" in caplog.text


def test_a_job_with_more_than_the_machine_has_says_why_it_does_not_start(job: Callable[..., Job]) -> None:
    refused = job(Size(0.5, 300, 0.5, "gpus", 20_000))
    refused._thread.join(PATIENCE_S)
    assert refused.ended == "its worker does not start"
    assert "20,000 MB" in refused.read()[-1].detail  # type: ignore[union-attr]

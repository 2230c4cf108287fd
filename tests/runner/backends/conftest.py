"""A desk that collects a backend's reports, and programs that travel to workers by value."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from prefect_slo.resources import Size
from prefect_slo.runner.backends.processes import ProcessBackend
from prefect_slo.runner.backends.protocol import Bundle, Finished, ItemReport, Lost, Opened, Outcome, Progress, Report
from prefect_slo.runner.local.ledger import FileBook, Ledger

PATIENCE_S = 30.0
SIZE = Size(1, 512)


class Desk:
    """Uses a backend the way a runner does, one step at a time."""

    def __init__(self, backend: ProcessBackend) -> None:
        self.backend = backend
        self.reports: list[Report] = []
        self._news = threading.Condition()
        self._ids = itertools.count(1)
        self._keys: dict[Callable[..., Any], int] = {}

    def sink(self, report: Report) -> None:
        with self._news:
            self.reports.append(report)
            self._news.notify_all()

    def wait_for(self, kind: type, *, since: int = 0, timeout_s: float = PATIENCE_S, **fields: object) -> Any:
        """The first report of a kind with these fields; a loss where none was waited for fails the test."""

        def found() -> Report | None:
            for report in self.reports[since:]:
                if isinstance(report, kind) and all(getattr(report, key) == value for key, value in fields.items()):
                    return report
            return None

        with self._news:
            assert self._news.wait_for(found, timeout_s), f"no {kind.__name__} {fields} among {self.reports[-5:]}"
            return found()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Look again after every report."""
        with self._news:
            assert self._news.wait_for(condition, PATIENCE_S), f"it never came true among {self.reports[-5:]}"

    def ask(self, size: Size = SIZE) -> int:
        """Open a lease without waiting for it."""
        lease = next(self._ids)
        self.backend.open(lease, size, self.sink)
        return lease

    def open(self, size: Size = SIZE) -> int:
        lease = self.ask(size)
        self.wait_for(Opened, lease=lease)
        return lease

    def opened(self, lease: int) -> Opened:
        return self.wait_for(Opened, lease=lease)

    def submit(
        self,
        lease: int,
        run_item: Callable[..., Any],
        payloads: Sequence[Any] = (b"",),
        *,
        timeout_s: float | None = None,
    ) -> int:
        """Send a bundle whose items are ``run_item(payload)``; ids count from 0."""
        bundle, key = next(self._ids), str(self._keys.setdefault(run_item, len(self._keys)))
        items = tuple((item, cloudpickle.dumps(payload)) for item, payload in enumerate(payloads))
        self.backend.submit(lease, Bundle(bundle, key, by_value(run_item), items, timeout_s))
        return bundle

    def run(self, lease: int, run_item: Callable[..., Any], payloads: Sequence[Any] = (b"",)) -> list[Any]:
        """Results of a bundle, in the order of their items."""
        since = len(self.reports)
        bundle = self.submit(lease, run_item, payloads)
        self.wait_for(Finished, since=since, lease=lease, bundle=bundle)
        return [cloudpickle.loads(report.outcome.payload) for report in self.items(bundle)]

    def items(self, bundle: int) -> list[ItemReport]:
        found = [report for report in self.reports if isinstance(report, Progress) and report.bundle == bundle]
        return [item for report in found for item in report.items]

    def lost(self, lease: int) -> Lost:
        return self.wait_for(Lost, lease=lease)


def by_value(run_item: Callable[[Any], Any]) -> bytes:
    """A pickled program that calls ``run_item`` with each payload and pickles what it returns."""

    class Given:
        def open(self, emit: Callable[[bytes], None]) -> Callable[[int, Any], Outcome]:
            return lambda item, payload: Outcome(cloudpickle.dumps(run_item(cloudpickle.loads(payload))))

    return cloudpickle.dumps(Given())


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger of the test's own, generous enough for the workers of a test on a small machine."""
    cores = tuple(range(4)) if (os.cpu_count() or 1) < 4 else None
    return Ledger(FileBook(tmp_path / "vcpus.json"), cores=cores, vcpus=4)


@pytest.fixture(params=["zygote", "spawn"])
def start(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def desk(ledger: Ledger, start: str) -> Iterator[Desk]:
    """A desk on a private backend, for both ways to start workers; nothing of it is left behind."""
    threads, fds = set(threading.enumerate()), descriptors()
    backend = ProcessBackend(ledger=ledger, start=start)
    desk = Desk(backend)
    yield desk
    pids = backend.pids
    backend.shutdown()
    assert not [pid for pid in pids if alive(pid)]
    assert {thread for thread in set(threading.enumerate()) - threads if thread.name.startswith("prefect-slo")} == set()
    until = time.monotonic() + PATIENCE_S  # what else this process has running opens and closes some, too
    while descriptors() > fds and time.monotonic() < until:
        time.sleep(0.01)
    assert descriptors() <= fds
    assert ledger.used() == 0


@pytest.fixture
def desk_on() -> Iterator[Callable[[ProcessBackend], Desk]]:
    """Makes desks on backends that end with the test."""
    backends: list[ProcessBackend] = []

    def make(backend: ProcessBackend) -> Desk:
        backends.append(backend)
        return Desk(backend)

    yield make
    for backend in backends:
        backend.shutdown()


@pytest.fixture(name="by_value")
def by_value_fixture() -> tuple[Callable[..., bytes], Callable[..., bytes]]:
    """Pickles a program, and pickles a payload."""
    return by_value, cloudpickle.dumps


@pytest.fixture
def desk_of() -> type[Desk]:
    return Desk


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Waits for something that no event tells of, e.g. the end of a process that isn't ours."""

    def wait(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.01)

    return wait


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie doesn't."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")


@pytest.fixture(name="alive")
def alive_fixture() -> Callable[[int], bool]:
    return alive

"""What every backend does, whatever it runs on; another backend joins by one line in ``BACKENDS``."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from prefect_slo import BatchJobs, BatchPool
from prefect_slo.resources import Size
from prefect_slo.runner.backends.processes import ProcessBackend
from prefect_slo.runner.backends.protocol import (
    Backend,
    Bundle,
    Chatter,
    Finished,
    ItemReport,
    Lost,
    Opened,
    Outcome,
    Progress,
    Report,
)
from prefect_slo.runner.backends.threads import ThreadBackend
from prefect_slo.runner.backends.work_pool import WorkPoolBackend
from prefect_slo.runner.cluster_pools import DaskPool, RayPool
from prefect_slo.runner.local.ledger import FileBook, Ledger
from prefect_slo.runner.work_pools import WorkPool
from prefect_slo.testing.aws import LocalAws

BACKENDS: dict[str, Callable[[pytest.FixtureRequest, Path], Backend]] = {
    "thread": lambda request, folder: ThreadBackend(),
    "process": lambda request, folder: ProcessBackend(ledger=Ledger(FileBook(folder / "vcpus.json"), vcpus=4)),
    "work pool": lambda request, folder: request.getfixturevalue("pilots")(),
    "lambda": lambda request, folder: request.getfixturevalue("account").pool(memory_mb=(512,)).backend(None),
    "batch": lambda request, folder: BatchPool(*request.getfixturevalue("jobs")).backend(None),
    "dask": lambda request, folder: DaskPool(concurrency=4).backend(None),
    "ray": lambda request, folder: (request.getfixturevalue("ray"), RayPool(concurrency=4))[1].backend(None),
}
KILLED = ("signal 9", "signal: killed", "exit code 137")
"""How a backend says that a worker was ended by SIGKILL."""

NEVER_WARM = ("batch",)  # every bundle is a job of its own
SIZE, EDGE = Size(1, 512), "edge"
PATIENCE_S = 60.0


class Calls:
    """A program that calls a function with each payload."""

    def __init__(self, fn: Callable[[Any], Any], *, pickled: bool) -> None:
        self.fn, self.pickled = fn, pickled

    def open(self, emit: Callable[[bytes], None]) -> Callable[[int, Any], Outcome]:
        fn, pickled = self.fn, self.pickled

        def run(item: int, payload: Any) -> Outcome:
            import cloudpickle

            value = cloudpickle.loads(payload) if pickled else payload
            if value == "emit":
                emit(b"chatter")
            result = fn(value)
            return Outcome(cloudpickle.dumps(result) if pickled else result)

        return run


class Unopenable:
    """A program that no worker can open."""

    def open(self, emit: Callable[[bytes], None]) -> Any:
        raise ImportError("no module named nowhere")


class Desk:
    """Uses a backend as the runner does."""

    def __init__(self, backend: Backend, kind: str) -> None:
        self.backend, self.kind, self.can = backend, kind, backend.capabilities()
        self.size = replace(SIZE, hardware=self.can.hardware[0])
        self.reports: list[Report] = []
        self._news = threading.Condition()
        self._ids = itertools.count(1)

    def sink(self, report: Report) -> None:
        with self._news:
            self.reports.append(report)
            self._news.notify_all()

    def wait(self, kind: type, **fields: Any) -> Any:
        """The first report of a kind with these fields."""

        def found() -> Any:
            return next(
                (r for r in self.reports if isinstance(r, kind) and all(getattr(r, k) == v for k, v in fields.items())),
                None,
            )

        with self._news:
            assert self._news.wait_for(found, PATIENCE_S), f"no {kind.__name__} {fields} in {self.reports[-3:]}"
            return found()

    def open(self) -> int:
        lease = next(self._ids)
        self.backend.open(lease, self.size, self.sink)
        self.wait(Opened, lease=lease)
        return lease

    def submit(self, lease: int, fn: Callable[[Any], Any], values: list[Any], timeout_s: float | None = None) -> int:
        program: Any = Calls(fn, pickled=self.can.isolated)
        return self.send(lease, program, values, timeout_s)

    def send(self, lease: int, program: Any, values: list[Any], timeout_s: float | None = None) -> int:
        bundle = next(self._ids)
        if self.can.isolated:
            cloudpickle.register_pickle_by_value(__import__("sys").modules[type(program).__module__])
            program, values = cloudpickle.dumps(program), [cloudpickle.dumps(value) for value in values]
        items = tuple((100 * bundle + n, value) for n, value in enumerate(values))
        self.backend.submit(lease, Bundle(bundle, f"key-{bundle}", program, items, timeout_s))
        return bundle

    def items(self, bundle: int) -> list[ItemReport]:
        progress = [report for report in self.reports if isinstance(report, Progress) and report.bundle == bundle]
        return [item for report in progress for item in report.items]

    def results(self, bundle: int) -> list[Any]:
        self.wait(Finished, bundle=bundle)
        payloads = [item.outcome.payload for item in self.items(bundle)]
        return [cloudpickle.loads(payload) for payload in payloads] if self.can.isolated else payloads

    def run(self, lease: int, fn: Callable[[Any], Any], values: list[Any]) -> list[Any]:
        return self.results(self.submit(lease, fn, values))


@pytest.fixture(scope="module")
def jobs(account: LocalAws) -> tuple[BatchJobs, str]:
    """Jobs that really run, and where they find their work."""
    jobs = BatchJobs(account.batch.queue(), "image", poll_s=(0.02, 0.1), gather_s=0.02, region="us-east-1")
    BatchPool(jobs, account.bucket).jobs.deploy()
    return jobs, account.bucket


@pytest.fixture(scope="module")
def pilots(process_pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Backend]]:
    """Backends on the pilots of a real work pool, which stay warm from test to test: each takes seconds to start.

    Its machines are of a kind that nothing else knows: kinds are names, and no code goes by them.
    """
    process_pool("conformance")
    storage = tmp_path_factory.mktemp("mailboxes")
    pool = WorkPool("conformance", sizes=(SIZE,), storage=storage, concurrency=2, idle_s=600, hardware=EDGE)
    office = pool.new_office()
    yield lambda: WorkPoolBackend(office, hardware=(EDGE,), memory_mb=512, notice=print)
    office.shut()


@pytest.fixture(params=BACKENDS)
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    backend = BACKENDS[request.param](request, tmp_path)
    yield Desk(backend, request.param)
    backend.shutdown()


def started(path: Path) -> None:
    """Wait for a file that running code makes."""
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline, "the item never started"
        time.sleep(0.005)


def assert_tells_the_truth(desk: Desk, lost: Lost, running: int, untouched: tuple[int, ...]) -> None:
    """Where nobody hears of single items a loss may know less, but nothing that is wrong."""
    told = (lost.running, lost.untouched)
    assert told == (running, untouched) or (not desk.can.streams and told in ((running, ()), (None, ())))


def test_items_run_in_order_and_their_results_come_back(desk):
    assert desk.run(desk.open(), lambda x: x + 1, [1, 2, 3]) == [2, 3, 4]


def test_items_are_reported_in_order_before_the_end_of_their_bundle(desk):
    lease = desk.open()
    bundle = desk.submit(lease, lambda x: x, list(range(50)))
    desk.wait(Finished, bundle=bundle)
    assert [item.item for item in desk.items(bundle)] == [100 * bundle + n for n in range(50)]
    mine = [report for report in desk.reports if getattr(report, "bundle", None) == bundle]
    assert isinstance(mine[-1], Finished)


def test_a_lease_runs_one_bundle_after_another(desk):
    lease = desk.open()
    assert [desk.run(lease, lambda x: 2 * x, [n]) for n in range(5)] == [[0], [2], [4], [6], [8]]


def test_leases_run_at_the_same_time(desk, tmp_path):
    """Each waits for the other: one after the other they would never end."""

    def meet(names):
        mine, other = names
        mine.touch()
        deadline = time.monotonic() + 30
        while not other.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        return other.exists()

    a, b = tmp_path / "a", tmp_path / "b"
    first, second = desk.open(), desk.open()
    bundles = [desk.submit(first, meet, [(a, b)]), desk.submit(second, meet, [(b, a)])]
    assert [desk.results(bundle) for bundle in bundles] == [[True], [True]]


def test_large_payloads_travel_both_ways(desk):
    data = os.urandom(1024) * 20 * 1024  # more than any service takes in a call
    [back] = desk.run(desk.open(), lambda value: value[::-1], [data])
    assert back == data[::-1]


def test_a_bundle_says_when_it_ran_and_what_it_took(desk):
    lease = desk.open()
    before = time.monotonic()
    bundle = desk.submit(lease, lambda x: sum(i * i for i in range(200_000)), [1, 2])
    done = desk.wait(Finished, bundle=bundle)
    after = time.monotonic()
    first, second = desk.items(bundle)
    assert before <= done.received <= first.started < first.ended <= second.started < second.ended <= done.ended
    assert done.ended <= after
    assert 0 <= done.open_s <= done.ended - done.received
    assert 0 < done.cpu_s <= 2 * (done.ended - done.received) + 0.1
    if desk.can.isolated:
        assert done.peak_mb > 1
        assert done.bytes_in > 0
        assert done.bytes_out > 0


def test_a_lease_says_how_it_got_its_worker(desk):
    lease = desk.open()
    opened = desk.wait(Opened, lease=lease)
    assert opened.start_s >= 0
    assert opened.wait_s >= 0
    assert (opened.pid != os.getpid()) == desk.can.isolated


def test_a_worker_that_was_given_back_serves_the_next_lease_warm(desk):
    lease = desk.open()
    [who] = desk.run(lease, lambda _: (os.getpid(), threading.get_ident()), [0])
    desk.backend.close(lease)
    again = desk.open()
    assert not desk.wait(Opened, lease=again).cold
    [then] = desk.run(again, lambda _: (os.getpid(), threading.get_ident()), [0])
    assert (then == who) == (desk.kind not in NEVER_WARM)


def test_isolated_items_leave_the_flows_process_alone(desk):
    def pollute(_):
        os.environ["PREFECT_SLO_TEST_POLLUTED"] = "yes"
        return os.getpid()

    try:
        [pid] = desk.run(desk.open(), pollute, [0])
        assert (pid != os.getpid()) == desk.can.isolated
        assert ("PREFECT_SLO_TEST_POLLUTED" not in os.environ) == desk.can.isolated
    finally:
        os.environ.pop("PREFECT_SLO_TEST_POLLUTED", None)


def test_what_a_program_emits_arrives_beside_its_outcomes(desk):
    lease = desk.open()
    desk.run(lease, lambda x: x, ["quiet", "emit"])
    assert desk.wait(Chatter, lease=lease).payload == b"chatter"


def test_cancelling_loses_the_lease_and_says_what_was_not_started(desk, tmp_path):
    flag = tmp_path / "started"

    def begin(path):
        path.touch()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            time.sleep(0.01)

    lease = desk.open()
    bundle = desk.submit(lease, begin, [flag, flag, flag])
    started(flag)
    desk.backend.cancel(lease)
    lost = desk.wait(Lost, lease=lease)
    assert (lost.reason, lost.bundle) == ("cancelled", bundle)
    assert_tells_the_truth(desk, lost, 100 * bundle, (100 * bundle + 1, 100 * bundle + 2))
    other = desk.open()
    assert desk.run(other, lambda x: x, [1]) == [1]


def test_a_program_that_cannot_be_opened_loses_the_lease_with_nothing_started(desk):
    lease = desk.open()
    bundle = desk.send(lease, Unopenable(), [1, 2])
    lost = desk.wait(Lost, lease=lease)
    assert lost.reason == "start"
    assert "nowhere" in lost.detail
    assert set(lost.untouched) == {100 * bundle, 100 * bundle + 1}


def test_a_dead_worker_is_reported_with_the_item_that_it_ran(desk):
    if not desk.can.isolated:  # nothing dies alone there: items run in this very process
        assert desk.run(desk.open(), lambda _: os.getpid(), [1]) == [os.getpid()]
        return

    def die(x):
        if x == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    lease = desk.open()
    bundle = desk.submit(lease, die, [0, 1, 2])
    lost = desk.wait(Lost, lease=lease)
    assert lost.reason == "died"
    assert_tells_the_truth(desk, lost, 100 * bundle + 1, (100 * bundle + 2,))
    assert any(words in lost.detail for words in KILLED), lost.detail
    assert desk.run(desk.open(), lambda x: x, [5]) == [5]


def test_an_item_that_overruns_ends_with_its_worker(desk):
    def overrun(x):
        time.sleep(30 if x else 0)

    if not desk.can.hard_timeouts:  # nothing is ended there, and its lease goes on
        lease = desk.open()
        desk.submit(lease, lambda x: time.sleep(0.2) or x, [0, 1], timeout_s=0.05)
        desk.wait(Finished, lease=lease)
        assert desk.run(lease, lambda x: x, [1]) == [1]
        return
    lease = desk.open()
    bundle = desk.submit(lease, overrun, [0, 1, 2], timeout_s=1.5)
    lost = desk.wait(Lost, lease=lease)
    assert (lost.reason, lost.running) == ("timeout", 100 * bundle + 1)


def test_shutting_down_twice_is_shutting_down_once(desk):
    lease = desk.open()
    desk.run(lease, lambda x: x, [1])
    desk.backend.shutdown()
    told = list(desk.reports)
    desk.backend.shutdown()
    assert desk.reports == told, "nobody is told of an end twice"
    assert sum(isinstance(report, Lost) for report in told) <= 1


def test_a_backend_that_is_shut_down_opens_nothing(desk):
    desk.backend.shutdown()
    desk.backend.open(77, desk.size, desk.sink)
    assert desk.wait(Lost, lease=77).reason == "start"

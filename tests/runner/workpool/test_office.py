"""Who serves whom, what starts and idling cost, and what a start is not: an office with pilots that the test plays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import State, StateType

from prefect_slo.control.events import OpenLease
from prefect_slo.pricing import price_list
from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Bundle, Finished, Lost, Opened
from prefect_slo.runner.backends.work_pool import WorkPoolBackend
from prefect_slo.runner.leases import Leases
from prefect_slo.runner.measure import Measure
from prefect_slo.runner.workpool import watch
from prefect_slo.runner.workpool.contact import Lease, Owner
from prefect_slo.runner.workpool.jobs import Found
from prefect_slo.runner.workpool.mailbox import FROM_JOB, TO_JOB, Incoming, Outgoing
from prefect_slo.runner.workpool.office import Office, Terms
from prefect_slo.runner.workpool.pilot import Letter, Order
from prefect_slo.runner.workpool.starting import Starts
from prefect_slo.runner.workpool.stores import FolderStore

SIZE = Size(1, 512)
PATIENCE_S = 20.0


@dataclass
class PlayedJobs:
    """Jobs that the test starts by hand; ``full`` is a pool that can start none, ``paused`` one that did before."""

    full: bool = False
    paused: bool = False
    found: Found = "unbegun"
    looks: int = 0
    asked: dict[UUID, Order] = field(default_factory=dict)
    cancelled: list[UUID] = field(default_factory=list)

    def start(self, name: str, order: Order, variables: Any) -> UUID:
        flow_run = uuid4()
        self.asked[flow_run] = order
        return flow_run

    def states(self, flow_runs: Any) -> dict[UUID, State[Any]]:
        return {run: State(type=StateType.SCHEDULED if self.full else StateType.RUNNING) for run in flow_runs}

    def blocked(self) -> bool:
        self.looks += 1
        return self.full or self.paused

    def trouble(self) -> str:
        return ""

    def cancel(self, flow_run: UUID) -> Found:
        self.cancelled.append(flow_run)
        return self.found

    def crashed(self, flow_run: UUID, why: str) -> None: ...

    def close(self) -> None: ...


class Played:
    """The job of a pilot, as the test plays it."""

    def __init__(self, store: FolderStore, order: Order) -> None:
        self._out, self.inbox = Outgoing(store, order.box, FROM_JOB), Incoming(store, order.box, TO_JOB)

    def begins(self, age_s: float = 0.0) -> None:
        self._out.send(Letter(time.monotonic(), {}, (), age_s=age_s))

    def up(self, age_s: float = 0.0, wait_s: float = 0.0, *, no_gpu: bool = False) -> None:
        opened = Opened(1, True, 0.1, wait_s, 4711, no_gpu=no_gpu)
        self._out.send(Letter(time.monotonic(), {}, (opened,), age_s=age_s))

    def done(self, bundle: int) -> None:
        now = time.monotonic()
        self._out.send(Letter(now, {}, (Finished(1, bundle, now, now),)))

    def fails(self, age_s: float) -> None:
        self._out.send(Letter(time.monotonic(), {}, (), "its worker does not start", age_s=age_s))

    def is_sent_home(self) -> bool:
        return self.inbox.receive() == ("close",)


class Scene:
    """An office, its jobs, and leases that note what they hear."""

    def __init__(self, folder: Path, terms: Terms, clock: Callable[[], float]) -> None:
        self.store, self.jobs, self.clock = FolderStore(str(folder)), PlayedJobs(), clock
        self.office = Office(
            "pool",
            self.jobs,
            self.store,
            lambda _: {},
            terms,
            copy_context(),
            clock=clock,  # type: ignore[arg-type]
        )
        self.heard: dict[int, list[Any]] = {}
        self.told: list[str] = []

    def lease(self, number: int, owner: Owner | None = None, size: Size = SIZE) -> Lease:
        """One of a flow run of its own, of stage ``crop``, unless it says otherwise."""
        self.heard[number] = []
        whose = owner or Owner(number, "crop")
        asked = Lease(number, whose, size, self.heard[number].append, self.told.append, self.clock())
        self.office.open(asked)
        return asked

    def job(self, number: int) -> Played:
        until(lambda: len(self.jobs.asked) > number)
        return Played(self.store, list(self.jobs.asked.values())[number])

    def opened(self, number: int) -> Opened:
        until(lambda: self.heard[number])
        [report] = self.heard[number]
        assert isinstance(report, Opened)
        return report


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def make(clock: Callable[[], float] = time.monotonic, **terms: Any) -> Scene:
        made.append(Scene(tmp_path / str(len(made)), Terms(**{"idle_s": 600.0, **terms}), clock))
        return made[-1]

    yield make
    for one in made:
        one.office.shut(patience_s=1.0)


def test_each_lease_of_a_pilot_hears_that_its_machine_has_no_gpu(scene: Any) -> None:
    at = scene()
    first = at.lease(1)
    at.job(0).up(no_gpu=True)
    assert at.opened(1).no_gpu
    at.office.close(first)
    at.lease(2)
    assert at.opened(2).no_gpu


def test_a_pilot_that_gets_free_serves_a_lease_whose_own_is_still_starting(scene: Any) -> None:
    at = scene()
    first = at.lease(1)
    at.job(0).up()
    at.opened(1)
    at.lease(2)  # its own pilot never comes
    at.job(1)
    at.office.close(first)
    report = at.opened(2)
    assert report.pid == 4711
    assert report.cold, "it waited for a start, if not to its end"
    assert report.start_s > 0
    assert len(at.jobs.asked) == 2


def test_waiting_for_a_share_of_its_machine_is_no_start(scene: Any) -> None:
    at = scene(idle_s=None)
    at.lease(1)
    at.job(0).up(wait_s=1000.0)
    report = at.opened(1)
    assert (report.start_s, at.office.keep_s) == (0.0, 0.0)
    assert report.wait_s > 0


def test_a_job_that_waits_for_its_machine_is_up_and_not_given_up(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.02)
    at = scene(patience_s=0.5, give_up_s=2.0)
    at.lease(1)
    job = at.job(0)
    job.begins(age_s=2.0)
    [pilot] = at.office.pilots
    until(lambda: any("wait for a share of their machine" in told for told in at.told))
    until(lambda: time.monotonic() - pilot.born > 2.2)
    assert not at.heard[1]
    job.up(age_s=9.0)
    assert at.opened(1).held_s == pytest.approx(9.0), "it is paid for since its job has begun"


def test_a_job_that_is_not_up_is_given_up(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.02)
    at = scene(patience_s=0.05, give_up_s=0.2)
    at.lease(1)
    until(lambda: at.heard[1])
    assert at.heard[1][0].reason == "start"
    assert "has not started a job yet" in at.told[0]


def test_a_pilot_that_gets_free_serves_a_lease_whose_own_waits_for_their_machine(scene: Any) -> None:
    at = scene()
    first = at.lease(1)
    at.job(0).up()
    at.opened(1)
    at.lease(2)
    at.job(1).begins()
    until(lambda: all(pilot.heard_of for pilot in at.office.pilots))
    at.office.close(first)
    assert at.opened(2).pid == 4711


def test_the_pilot_that_was_asked_for_is_a_spare_then(scene: Any) -> None:
    at = scene()
    first = at.lease(1)
    at.job(0).up()
    at.opened(1)
    at.lease(2)
    spare = at.job(1)
    at.office.close(first)
    at.opened(2)
    spare.up()
    until(lambda: sum(pilot.ready for pilot in at.office.pilots) == 2)
    at.lease(3)
    assert not at.opened(3).cold
    assert len(at.jobs.asked) == 2


def test_who_starts_a_pilot_pays_for_its_start_and_who_finds_one_for_what_it_idled(scene: Any) -> None:
    at = scene()
    first = at.lease(1)
    at.job(0).up(age_s=7.0)
    assert at.opened(1).held_s == pytest.approx(7.0)
    at.office.close(first)
    idle_since = time.monotonic()
    time.sleep(0.05)
    at.lease(2)
    assert 0.05 <= at.opened(2).held_s <= time.monotonic() - idle_since + 0.05


def test_what_a_pilot_idled_in_vain_is_paid_by_the_next_lease_of_its_size(scene: Any) -> None:
    at = scene(idle_s=0.1)
    first = at.lease(1)
    job = at.job(0)
    job.up(age_s=1.0)
    at.opened(1)
    at.office.close(first)
    until(job.is_sent_home)
    until(lambda: not at.office.pilots)
    at.lease(2)
    at.job(1).up(age_s=5.0)
    report = at.opened(2)
    assert report.cold
    assert report.held_s >= 5.0 + 0.1


def test_time_in_which_the_pool_could_start_nothing_is_waiting_and_no_start(
    scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.02)
    at = scene()
    at.jobs.full = True
    at.lease(1)
    job = at.job(0)
    [pilot] = at.office.pilots
    until(lambda: pilot.blocked_s > 0.2)
    at.jobs.full = False
    job.up()
    report = at.opened(1)
    assert report.wait_s >= 0.2
    assert report.start_s + report.wait_s == pytest.approx(time.monotonic() - pilot.born, abs=0.5)
    assert at.office.keep_s == 600.0


def test_what_blocked_a_spare_before_is_no_waiting_of_who_takes_it(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.02)
    at = scene()
    at.jobs.full = True
    first = at.lease(1)
    job = at.job(0)
    [pilot] = at.office.pilots
    until(lambda: pilot.blocked_s > 0.3)
    at.jobs.full = False
    at.office.close(first)
    at.lease(2)
    time.sleep(0.05)
    job.up()
    report = at.opened(2)
    assert report.cold
    assert report.start_s >= 0.05
    assert report.wait_s < 0.3


def test_a_start_that_came_to_nothing_is_paid_by_the_next_lease_of_its_size(scene: Any) -> None:
    at = scene()
    at.lease(1)
    at.job(0).fails(age_s=7.0)
    until(lambda: at.heard[1])
    assert isinstance(at.heard[1][0], Lost)
    at.lease(2)
    at.job(1).up(age_s=1.0)
    assert at.opened(2).held_s == pytest.approx(8.0)


def test_a_pilot_that_has_lived_long_enough_leaves_no_debt_for_what_was_paid(scene: Any) -> None:
    at = scene(lifetime_s=0.2)
    first = at.lease(1)
    job = at.job(0)
    job.up()
    at.opened(1)
    at.office.submit(first, Bundle(1, "program", None, ()))
    time.sleep(0.3)
    job.done(1)
    until(lambda: isinstance(at.heard[1][-1], Lost))
    until(job.is_sent_home)
    until(lambda: not at.office.pilots)
    assert at.office.debts(SIZE) < 0.2


def test_a_pilot_stays_warm_for_as_long_as_starting_it_took(scene: Any) -> None:
    at = scene(idle_s=None)
    first = at.lease(1)
    job = at.job(0)
    time.sleep(0.3)
    job.up()
    start_s = at.opened(1).start_s
    assert at.office.keep_s == pytest.approx(start_s, abs=0.1)
    at.office.close(first)
    until(job.is_sent_home)


def test_pilots_are_sent_home_with_a_letter_that_outlives_their_office(scene: Any) -> None:
    at = scene()
    at.lease(1)
    job = at.job(0)
    job.up()
    at.opened(1)
    at.office.shut()
    assert job.is_sent_home()
    assert isinstance(at.heard[1][-1], Lost)


@pytest.mark.parametrize("found", ["unbegun", "starting", "over"])
def test_a_job_that_was_called_off_while_it_started_leaves_no_mailbox(scene: Any, found: Found) -> None:
    at = scene()
    at.jobs.found = found
    at.lease(1)
    until(lambda: at.jobs.asked)
    at.office.shut()
    assert not [path for path in Path(at.store.path).rglob("*") if path.is_file()]


def test_a_job_that_runs_and_was_not_heard_of_yet_hears_that_it_is_to_go(scene: Any) -> None:
    at = scene()
    at.jobs.found = "running"
    at.lease(1)
    job = at.job(0)
    at.office.shut()
    assert job.is_sent_home()


def test_a_pilot_that_is_lost_while_it_is_sent_home_leaves_no_letter(scene: Any, monkeypatch: Any) -> None:
    at = scene()
    write = FolderStore.write

    def late(self: FolderStore, box: str, name: str, body: bytes) -> None:
        if name.startswith(TO_JOB):
            pilot.lose("died", "its job has ended")
        write(self, box, name, body)

    at.lease(1)
    at.job(0).up()
    at.opened(1)
    [pilot] = at.office.pilots
    monkeypatch.setattr(FolderStore, "write", late)
    at.office.shut()
    pilot._thread.join(PATIENCE_S)
    assert not Path(at.store.path, pilot.box).exists()


def test_what_a_job_did_not_read_before_it_was_over_goes_with_its_office(scene: Any, monkeypatch: Any) -> None:
    at = scene()
    at.jobs.found = "running"
    monkeypatch.setattr(at.jobs, "states", lambda runs: {run: State(type=StateType.CANCELLED) for run in runs})
    at.lease(1)
    until(lambda: at.jobs.asked)
    at.office.shut()
    assert not [path for path in Path(at.store.path).rglob("*") if path.is_file()]


def test_clearing_up_waits_for_slow_storage_no_longer_than_its_office_may(scene: Any, monkeypatch: Any) -> None:
    at = scene()
    at.jobs.found = "starting"
    at.lease(1)
    until(lambda: at.jobs.asked)
    [pilot], freed = at.office.pilots, threading.Event()
    clear = FolderStore.clear

    def slow(self: FolderStore, box: str) -> None:
        if box == pilot.box:
            freed.wait(PATIENCE_S)
        clear(self, box)

    monkeypatch.setattr(FolderStore, "clear", slow)
    ended = threading.Thread(target=at.office.shut, args=(0.5,))
    ended.start()
    ended.join(PATIENCE_S / 2)
    assert not ended.is_alive()
    freed.set()


def test_a_pilot_that_has_said_that_it_ends_is_written_to_no_more(scene: Any) -> None:
    at = scene(idle_s=0.0)
    at.lease(1)
    job = at.job(0)
    job.up()
    at.opened(1)
    [pilot] = at.office.pilots
    job.fails(0.0)
    pilot._thread.join(PATIENCE_S)
    assert isinstance(at.heard[1][-1], Lost)
    assert not Path(at.store.path, pilot.box).exists()


def test_storage_that_cannot_be_written_is_said_once(scene: Any, caplog: Any, monkeypatch: Any) -> None:
    tries: list[str] = []

    def fail(self: FolderStore, box: str, name: str, body: bytes) -> None:
        tries.append(name)
        raise OSError("no space left on device")

    monkeypatch.setattr(FolderStore, "write", fail)
    at = scene(heartbeat_s=0.001)
    until(lambda: len(tries) > 20)
    at.office.shut(patience_s=1.0)
    assert len([one for one in caplog.records if "cannot be written" in one.getMessage()]) == 1


class Hands:
    """A clock that the test moves on."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def measured(scene: Any) -> tuple[Scene, Hands]:
    return measured_at(scene)


def measured_at(scene: Any, **terms: Any) -> tuple[Scene, Hands]:
    """An office whose pilots have taken 8 s to start, and are held for 5 s by every lease; one is up and free."""
    hands = Hands()
    at = scene(hands, heartbeat_s=1e6, lifetime_s=1e6, **terms)
    first = at.lease(1)
    job = at.job(0)
    hands.now_s += 8.0
    job.up()
    at.opened(1)
    for number in (2, 3):
        hands.now_s += 5.0
        at.office.close(first)
        first = at.lease(number)
        at.opened(number)
    at.office.close(first)
    return at, hands


def test_no_pilot_is_started_for_a_wait_that_is_shorter_than_a_start(measured: tuple[Scene, Hands]) -> None:
    at, hands = measured
    busy = at.lease(4)
    hands.now_s += 4.6
    at.lease(5)
    at.office.reconsider()
    hands.now_s += 0.4
    at.office.close(busy)
    report = at.opened(5)
    assert report.start_s == pytest.approx(0.4), "in place of a start; others held nothing"
    assert report.wait_s == 0
    assert len(at.office.pilots) == len(at.jobs.asked) == 1


def test_one_is_started_once_the_pilot_that_runs_is_not_back_as_expected(measured: tuple[Scene, Hands]) -> None:
    at, hands = measured
    at.lease(4)
    hands.now_s += 4.6
    at.lease(5)
    assert len(at.office.pilots) == 1
    hands.now_s += 0.6  # nobody was held as long as that before: a postman who comes by sees it
    until(lambda: len(at.jobs.asked) == 2)


def test_a_pilot_that_gets_free_soon_is_expected_by_one_lease_alone(measured: tuple[Scene, Hands]) -> None:
    at, hands = measured
    at.lease(4)
    hands.now_s += 4.6
    at.lease(5)
    at.lease(6)
    until(lambda: len(at.jobs.asked) == 2)
    at.office.reconsider()
    assert len(at.office.pilots) == 2


def test_waiting_for_a_pilot_where_no_other_may_be_started_is_no_start(scene: Any) -> None:
    at, hands = measured_at(scene, concurrency=1)
    busy = at.lease(4)
    hands.now_s += 4.6
    at.lease(5)
    hands.now_s += 500.0
    at.office.close(busy)
    report = at.opened(5)
    assert (report.cold, report.start_s, report.wait_s) == (False, 0.0, pytest.approx(500.0))


def test_what_was_waited_until_no_other_could_be_started_is_in_place_of_a_start(scene: Any) -> None:
    at, hands = measured_at(scene, concurrency=2)
    busy = at.lease(4)
    hands.now_s += 4.6
    at.lease(5)
    hands.now_s += 0.1
    at.lease(6, size=Size(1, 1024))  # the last that may be started
    at.office.reconsider()
    hands.now_s += 500.0
    at.office.close(busy)
    report = at.opened(5)
    assert (report.start_s, report.wait_s) == (pytest.approx(0.1), pytest.approx(500.0))


def test_a_lease_that_had_to_wait_for_its_turn_has_only_then_begun_to_start(scene: Any) -> None:
    at, hands = measured_at(scene, concurrency=1)
    busy = at.lease(4)
    at.lease(5, size=Size(1, 1024))
    hands.now_s += 500.0
    at.office.close(busy)  # idle, and of another size: it makes room
    job = at.job(1)
    hands.now_s += 6.0
    job.up()
    report = at.opened(5)
    assert (report.start_s, report.wait_s) == (pytest.approx(6.0), pytest.approx(500.0))


def test_waiting_for_a_pilot_of_a_paused_pool_is_no_start(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.02)
    at, hands = measured_at(scene)
    busy = at.lease(4)
    hands.now_s += 4.6
    at.jobs.paused = True
    at.lease(5)
    until(lambda: at.jobs.looks > 1)
    at.office.reconsider()
    hands.now_s += 0.3
    at.office.close(busy)
    report = at.opened(5)
    assert (report.cold, report.start_s, report.wait_s) == (False, 0.0, pytest.approx(0.3))


def test_a_pool_that_is_asked_in_vain_hides_no_job_that_has_ended(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.02)
    at, hands = measured_at(scene)
    at.lease(4)
    hands.now_s += 4.6
    at.lease(5)
    [pilot] = at.office.pilots
    monkeypatch.setattr(at.jobs, "blocked", lambda: 1 / 0)
    monkeypatch.setattr(at.jobs, "states", lambda runs: {})  # the pool was deleted
    until(lambda: not pilot.usable(SIZE))


def test_a_stage_waits_for_no_pilot_that_it_holds_itself(measured: tuple[Scene, Hands]) -> None:
    at, hands = measured
    whose = Owner(7, "crop")
    at.lease(4, whose)
    hands.now_s += 4.6
    at.lease(5, whose)  # it is given the other one back only once nothing is left to run
    assert len(at.office.pilots) == 2


def test_leases_on_work_pools_say_whose_they_are(measured: tuple[Scene, Hands]) -> None:
    at, hands = measured
    runs = []
    for _ in range(2):
        backend = WorkPoolBackend(at.office, hardware=("cpu",), memory_mb=512, notice=at.told.append)
        measure = Measure(price_list("local"), machine=Size(1, 512))
        for stage in ("crop", "join"):
            measure.submitted(stage, 1, None)
        runs.append(Leases({"pool": backend}, measure, lambda report: None))
    runs[0].open(OpenLease(4, "crop", "pool", SIZE))
    hands.now_s += 4.6
    runs[0].open(OpenLease(5, "crop", "pool", SIZE))
    assert len(at.office.pilots) == 2, "its own stage holds the other one"
    runs[1].open(OpenLease(4, "crop", "pool", SIZE))
    assert len(at.office.pilots) == 2, "another run's is expected back"


def test_nobody_waits_longer_for_a_pilot_that_runs_than_a_start_takes() -> None:
    starts = Starts()
    assert starts.worth_it(0.0, [("crop", 1.0)]), "nothing was measured"
    starts.started(8.0)
    assert starts.worth_it(0.0, [("crop", 1.0)]), "nobody knows when it is back"
    for hold_s in (5.0, 100.0):
        starts.held("crop", hold_s)
    assert not starts.worth_it(0.0, [("crop", 99.0)])
    assert starts.worth_it(8.0, [("crop", 99.0)])
    assert starts.worth_it(0.0, [("crop", 6.0)]), "in 94 s"
    assert starts.worth_it(0.0, [("join", 99.0)]), "another stage holds them as long as it does"
    assert starts.worth_it(0.0, []), "none runs"
    assert starts.left_s("crop", 1.0) == pytest.approx((4.0 + 99.0) / 2)


def spare(at: Scene) -> UUID:
    """The job of a pilot whose lease is served by another one that got free."""
    first = at.lease(1)
    at.job(0).up()
    at.opened(1)
    at.lease(2)
    at.job(1)
    at.office.close(first)
    at.opened(2)
    return list(at.jobs.asked)[1]


def test_a_spare_that_nobody_has_begun_to_start_is_called_off(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.02)
    at = scene()
    at.jobs.full = True
    job = spare(at)
    until(lambda: len(at.office.pilots) == 1 and at.jobs.cancelled)
    assert at.jobs.cancelled == [job]
    at.lease(3)
    until(lambda: len(at.jobs.asked) == 3)


def test_a_spare_whose_job_starts_stays_for_the_next(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.02)
    at = scene()
    looks: list[int] = []
    states = at.jobs.states
    monkeypatch.setattr(at.jobs, "states", lambda runs: looks.append(1) or states(runs))
    spare(at)
    seen = len(looks)
    until(lambda: len(looks) > seen + 3)
    assert len(at.office.pilots) == 2
    assert not at.jobs.cancelled

"""Who serves whom, what starts and idling cost, and what a start is not: an office with pilots that the test plays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import State, StateType

from prefect_slo.resources import Size
from prefect_slo.runner.backends.protocol import Bundle, Finished, Lost, Opened
from prefect_slo.runner.workpool import office as offices
from prefect_slo.runner.workpool.contact import Lease
from prefect_slo.runner.workpool.mailbox import FROM_JOB, TO_JOB, Incoming, Outgoing
from prefect_slo.runner.workpool.office import Office, Terms
from prefect_slo.runner.workpool.pilot import Letter, Order
from prefect_slo.runner.workpool.stores import FolderStore

SIZE = Size(1, 512)
PATIENCE_S = 20.0


@dataclass
class PlayedJobs:
    """Jobs that the test starts by hand; ``full`` is a pool that can start none."""

    full: bool = False
    asked: dict[UUID, Order] = field(default_factory=dict)

    def start(self, name: str, order: Order, variables: Any) -> UUID:
        flow_run = uuid4()
        self.asked[flow_run] = order
        return flow_run

    def states(self, flow_runs: Any) -> dict[UUID, State[Any]]:
        return {run: State(type=StateType.SCHEDULED if self.full else StateType.RUNNING) for run in flow_runs}

    def blocked(self) -> bool:
        return self.full

    def trouble(self) -> str:
        return ""

    def cancel(self, flow_run: UUID) -> bool:
        return True

    def crashed(self, flow_run: UUID, why: str) -> None: ...

    def close(self) -> None: ...


class Played:
    """The job of a pilot, as the test plays it."""

    def __init__(self, store: FolderStore, order: Order) -> None:
        self._out, self.inbox = Outgoing(store, order.box, FROM_JOB), Incoming(store, order.box, TO_JOB)

    def begins(self, age_s: float = 0.0) -> None:
        self._out.send(Letter(time.monotonic(), {}, (), age_s=age_s))

    def up(self, age_s: float = 0.0, wait_s: float = 0.0) -> None:
        opened = Opened(1, True, 0.1, wait_s, 4711)
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

    def __init__(self, folder: Path, terms: Terms) -> None:
        self.store, self.jobs = FolderStore(str(folder)), PlayedJobs()
        self.office = Office("pool", self.jobs, self.store, lambda _: {}, terms, copy_context())  # type: ignore[arg-type]
        self.heard: dict[int, list[Any]] = {}
        self.told: list[str] = []

    def lease(self, number: int) -> Lease:
        self.heard[number] = []
        asked = Lease(number, SIZE, self.heard[number].append, self.told.append, time.monotonic())
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

    def make(**terms: Any) -> Scene:
        made.append(Scene(tmp_path / str(len(made)), Terms(**{"idle_s": 600.0, **terms})))
        return made[-1]

    yield make
    for one in made:
        one.office.shut(patience_s=1.0)


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
    monkeypatch.setattr(offices, "LOOK_S", 0.02)
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
    monkeypatch.setattr(offices, "LOOK_S", 0.02)
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
    monkeypatch.setattr(offices, "LOOK_S", 0.02)
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
    monkeypatch.setattr(offices, "LOOK_S", 0.02)
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

"""What the backend of clusters makes of what a cluster tells, whichever it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import cloudpickle
import pytest

from prefect_slo.control.need import Need
from prefect_slo.resources import Size
from prefect_slo.runner.backends.cluster import ClusterBackend
from prefect_slo.runner.backends.cluster_watch import LOOK_S, PATIENCE_S, Watch
from prefect_slo.runner.backends.processes import ProcessBackend
from prefect_slo.runner.backends.protocol import Bundle, Finished, Lost, Opened, Outcome
from prefect_slo.runner.backends.remote import Reply, Work, machine, run_here

LIMIT_S = 60.0


class Desk:
    """A cluster by hand: bundles run when they are told to."""

    def __init__(self, *there: str, own: bool = False) -> None:
        self.there, self.own = frozenset(there), own
        self.begun: list[float] | None = []
        self.how = "begun"
        self.started: SimpleQueue[tuple[Work, Callable[[Any], None]]] = SimpleQueue()

    def connect(self) -> None: ...

    def expect(self, need: Need) -> None: ...

    def lack(self, size: Size) -> str:
        return ""

    def vacant(self) -> str:
        return "" if self.there else "Nobody is there"

    def workers(self) -> frozenset[str]:
        return self.there

    def start(self, work: Work, parts: Any, done: Callable[[Any], None]) -> str:
        self.started.put((work, done))
        return work.token

    def never_ran(self, handle: str, error: Exception | None) -> bool:
        return False

    def turns(self, token: str) -> list[float] | None:
        return self.begun

    def end(self, handle: str) -> Any:
        return self.how

    def close(self, run_key: str) -> None: ...

    def run(self, worker: str) -> None:
        """The next bundle, on a worker."""
        work, done = self.started.get(timeout=LIMIT_S)
        now = time.monotonic()
        finished = Finished(1, work.bundle.id, now, now)
        done(lambda: Reply((Opened(1, False, 0.0, 0.0, 1), finished), machine(), now, now, worker))


def submitted(desk: Desk, **options: Any) -> tuple[ClusterBackend, SimpleQueue[Any], Opened]:
    """A backend with a bundle under way, and what it reports."""
    backend, reports = ClusterBackend(desk, {}, "run", **options), SimpleQueue[Any]()
    backend.open(1, Size(1, 512), reports.put)
    opened = reports.get(timeout=LIMIT_S)
    backend.submit(1, Bundle(7, "calls", b"", ((1, b"x"),)))
    return backend, reports, opened


@pytest.mark.parametrize(("there", "on_new"), [((), True), (("old",), True), (("old", "new"), False)])
def test_a_bundle_says_whether_its_worker_came_while_it_waited(there, on_new):
    desk = Desk(*there)
    backend, reports, _ = submitted(desk)
    desk.run("new")
    assert reports.get(timeout=LIMIT_S).on_new is on_new
    backend.shutdown()


def test_a_cluster_that_cannot_say_which_workers_it_has_has_started_none():
    desk = Desk()
    desk.workers = lambda: 1 / 0  # type: ignore[assignment, return-value]
    backend, reports, _ = submitted(desk)
    desk.run("new")
    assert not reports.get(timeout=LIMIT_S).on_new
    backend.shutdown()


@pytest.mark.parametrize("own", [True, False])
def test_the_start_of_a_cluster_of_the_runs_own_is_a_start_and_no_wait_for_others(own):
    backend, _, opened = submitted(Desk("one", own=own))
    backend.shutdown()
    assert (opened.cold, opened.start_s > 0, opened.wait_s >= 0) == (own, own, True)


def lost(desk: Desk) -> tuple[Lost, float, float]:
    """A bundle that is cancelled, before it was submitted, and when it was heard of."""
    since = time.monotonic()
    backend, reports, _ = submitted(desk)
    desk.started.get(timeout=LIMIT_S)
    if desk.begun:
        desk.begun[0] += time.time()
    backend.cancel(1)
    found = reports.get(timeout=LIMIT_S)
    backend.shutdown()
    return found, since, time.monotonic()


def test_a_bundle_that_is_cancelled_in_the_queue_has_held_nothing():
    found, since, heard = lost(Desk("one"))
    began, ended = found.held
    assert since <= began == ended <= heard
    assert found.untouched == (), "it may be about to begin"


@pytest.mark.parametrize("ahead_s", [-3600.0, 0.0, 3600.0])
def test_a_bundle_that_is_cancelled_while_it_runs_has_held_its_room_since_its_turn(ahead_s):
    """By another machine's clock, which may be wrong: not since before it was submitted, nor from after now on."""
    desk = Desk("one")
    desk.begun = [ahead_s]
    found, since, heard = lost(desk)
    began, ended = found.held
    assert since <= began <= ended <= heard
    assert (began < ended) is (ahead_s <= 0)


def _gone() -> Reply:
    raise OSError("the worker died")


def _outlived() -> Reply:
    return Reply((Lost(1, "died", "its process died", bundle=7),), machine(), time.monotonic(), time.monotonic(), "one")


@pytest.mark.parametrize("ended", [_gone, _outlived])
def test_a_bundle_that_the_cluster_is_still_ending_is_lost_when_it_has_ended(ended):
    """Till then its worker may be given the next bundle, and take it along."""
    desk = Desk("one")
    desk.how = "told"
    backend, reports, _ = submitted(desk)
    _, done = desk.started.get(timeout=LIMIT_S)
    backend.cancel(1)
    backend.open(2, Size(1, 512), reports.put)
    assert isinstance(reports.get(timeout=LIMIT_S), Opened), "heard after the cancelling"
    assert reports.empty()
    done(ended)
    found = reports.get(timeout=LIMIT_S)
    assert (found.reason, found.detail, found.bundle) == ("cancelled", "cancelled", 7)
    backend.shutdown()


def test_a_worker_that_dies_is_not_taken_for_the_end_of_an_earlier_bundle():
    desk = Desk("one")
    desk.how = "told"
    backend, reports, _ = submitted(desk)
    backend.cancel(1)
    desk.run("one")
    assert isinstance(reports.get(timeout=LIMIT_S), Finished), "it was faster"
    backend.submit(1, Bundle(8, "calls", b"", ((2, b"x"),)))
    _, done = desk.started.get(timeout=LIMIT_S)
    done(_gone)
    found = reports.get(timeout=LIMIT_S)
    assert (found.reason, found.bundle) == ("died", 8)
    backend.shutdown()


def test_what_a_cluster_keeps_no_account_of_may_have_run_all_along():
    desk = Desk("one")
    desk.begun = None
    assert lost(desk)[0].held is None


def test_a_cluster_without_workers_is_warned_of_however_much_it_is_asked():
    said: SimpleQueue[str] = SimpleQueue()
    backend, _, _ = submitted(Desk(), notice=said.put, patience_s=0.05)
    until = time.monotonic() + LIMIT_S
    while said.empty():
        assert time.monotonic() < until
        backend.expect(Need())
    backend.shutdown()
    assert said.get() == "Nobody is there. Bundles that wait: 1."


def test_a_worker_of_a_cluster_goes_on_after_all_processes_of_its_own_were_ended():
    class Program:  # a local one: it travels by value
        def open(self, emit: Any) -> Any:
            return lambda item, payload: Outcome(payload)

    work = Work("token", Bundle(7, "echo", cloudpickle.dumps(Program()), ((1, b"x"),)), Size(1, 512), ())
    for _ in range(2):
        assert isinstance(run_here(work).reports[-1], Finished)
        ProcessBackend.shutdown_all()


class Watched:
    """A watch with a clock that is set."""

    def __init__(self) -> None:
        self.now, self.lack, self.asked, self.said = 100.0, "Nobody is there", 0, list[str]()
        self.watch = Watch(lambda: self.lack, self.workers, self.said.append, clock=lambda: self.now)

    def workers(self) -> frozenset[str]:
        self.asked += 1
        return frozenset({f"worker {self.asked}"})


def test_a_watch_speaks_after_its_patience_once_and_again_when_workers_have_come_and_gone():
    seen = Watched()
    for lack in ("Nobody is there", "", "Nobody is there"):
        seen.lack = lack
        for _ in range(int(3 * PATIENCE_S / LOOK_S)):
            assert seen.watch.due_s() == pytest.approx(LOOK_S)
            seen.now += LOOK_S
            assert seen.watch.due_s() <= 0
            seen.watch.look(waiting=2)
    assert seen.said == ["Nobody is there. Bundles that wait: 2."] * 2


def test_a_watch_has_nothing_to_say_where_nothing_waits():
    seen = Watched()
    for _ in range(20):
        seen.now += LOOK_S
        seen.watch.look(waiting=0)
    assert not seen.said


def test_workers_are_asked_for_again_after_a_second():
    seen = Watched()
    assert seen.watch.there() == seen.watch.there() == {"worker 1"}
    seen.now += 1.5
    assert seen.watch.there() == {"worker 2"}

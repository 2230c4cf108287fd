"""Shares of a machine: never more than it has, first come first served, and never lost with a process that dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.errors import InvalidValue
from prefect_slo.runner.local.ledger import FileBook, Ledger, MemoryBook, default_book, place


@pytest.fixture(params=["file", "memory"])
def book(request, tmp_path):
    return FileBook(tmp_path / "book.json") if request.param == "file" else MemoryBook()


@pytest.fixture
def ledger(book):
    return Ledger(book, cores=range(4), vcpus=4)


def test_whole_claims_have_cores_of_their_own(ledger):
    claims = [ledger.claim(vcpus) for vcpus in (1, 2, 1)]
    assert all(claim.granted for claim in claims)
    assert sorted(core for claim in claims for core in claim.cores) == [0, 1, 2, 3]
    assert ledger.used() == 4


def test_fractions_share_a_core_so_that_whole_claims_still_find_theirs(ledger):
    halves = [ledger.claim(0.5), ledger.claim(0.5)]
    assert {claim.cores for claim in halves} == {(0,)}
    assert ledger.claim(3).cores == (1, 2, 3)


def test_a_claim_waits_until_it_fits_and_nobody_overtakes_it(ledger):
    first, large, small = ledger.claim(2), ledger.claim(3), ledger.claim(1)
    assert (first.granted, large.granted, small.granted) == (True, False, False)
    assert not ledger.retry(small)
    ledger.release(first)
    assert not ledger.retry(small)
    assert ledger.retry(large)
    assert ledger.retry(small)


def test_a_claim_that_gives_up_waiting_makes_way(ledger):
    ledger.claim(3)
    large, small = ledger.claim(2), ledger.claim(1)
    ledger.release(large)
    assert ledger.retry(small)


def test_more_than_the_machine_has_is_refused_with_what_it_has(ledger):
    with pytest.raises(InvalidValue, match="at most 4"):
        ledger.claim(4.5)


def test_releasing_twice_frees_nothing_of_anyone_else(ledger):
    one, other = ledger.claim(2), ledger.claim(2)
    ledger.release(one)
    ledger.release(one)
    assert ledger.used() == 2
    assert other.granted


def test_two_ledgers_on_one_book_never_grant_a_core_twice(tmp_path):
    one, two = (Ledger(FileBook(tmp_path / "book.json"), cores=range(2), vcpus=2) for _ in range(2))
    mine, theirs = one.claim(1), two.claim(1)
    assert set(mine.cores).isdisjoint(theirs.cores)
    waiting = one.claim(1)
    assert not waiting.granted
    two.release(theirs)
    assert one.retry(waiting)


def test_processes_that_may_use_other_cores_do_not_stand_in_each_others_way(tmp_path):
    book = FileBook(tmp_path / "book.json")
    low, high = Ledger(book, cores=(0, 1), vcpus=2), Ledger(book, cores=(2, 3), vcpus=2)
    assert low.claim(2).granted
    assert high.claim(2).cores == (2, 3)


def test_a_quota_below_the_cores_is_the_limit(book):
    ledger = Ledger(book, cores=range(8), vcpus=1.5)
    assert ledger.capacity == 1.5
    assert ledger.claim(1).granted
    assert not ledger.claim(1).granted


HOLDER = """
import sys, time
from pathlib import Path
from prefect_slo.runner.local.ledger import FileBook, Ledger
ledger = Ledger(FileBook(Path(sys.argv[1])), cores=range(4), vcpus=4)
claims = [ledger.claim(float(vcpus)) for vcpus in sys.argv[2:]]
print(*[claim.granted for claim in claims], flush=True)
time.sleep(600)
"""


def test_what_a_killed_process_held_and_waited_for_is_taken_back(tmp_path):
    path = tmp_path / "book.json"
    ledger = Ledger(FileBook(path), cores=range(4), vcpus=4)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), "3", "4"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "True False\n"
        claim = ledger.claim(2)
        assert not claim.granted
        holder.kill()
        holder.wait()
        assert ledger.retry(claim)
        assert ledger.used() == 2
    finally:
        holder.kill()
        holder.wait()


def test_a_process_id_that_was_used_again_holds_nothing(tmp_path):
    path = tmp_path / "book.json"
    path.write_text(json.dumps([9, [[1, os.getpid(), 1.0, 4.0, [0, 1, 2, 3]]], []]) + "\n")
    assert Ledger(FileBook(path), cores=range(4), vcpus=4).claim(4).granted


def test_a_damaged_file_is_begun_anew_and_said(tmp_path, caplog):
    path = tmp_path / "book.json"
    book = FileBook(path)
    ledger = Ledger(book, cores=range(4), vcpus=4)
    held, waiting = ledger.claim(3), ledger.claim(2)
    path.write_text("{ not a book")
    assert ledger.retry(waiting)
    assert caplog.text.count("begun anew") == 1
    ledger.release(held)
    ledger.release(waiting)
    assert ledger.used() == 0


def test_a_file_that_was_removed_is_made_again(tmp_path):
    path = tmp_path / "book.json"
    ledger = Ledger(FileBook(path), cores=range(4), vcpus=4)
    ledger.claim(1)
    path.unlink()
    assert ledger.claim(4).granted


def test_where_no_file_can_be_written_this_process_alone_is_accounted_for(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))
    assert isinstance(default_book(), MemoryBook)
    assert default_book() is default_book()


def test_the_users_book_is_readable_by_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert isinstance(default_book(), FileBook)
    (path,) = (tmp_path / "prefect-slo").iterdir()
    assert path.stat().st_mode & 0o077 == (tmp_path / "prefect-slo").stat().st_mode & 0o077 == 0


def test_threads_that_claim_and_release_at_once_never_exceed_the_machine(book):
    ledger = Ledger(book, cores=range(4), vcpus=4)
    in_use, most, lock = [0.0], [0.0], threading.Lock()

    def work(vcpus):
        for _ in range(30):
            claim = ledger.claim(vcpus)
            for _ in range(100_000):
                if ledger.retry(claim):
                    break
            with lock:
                in_use[0] += vcpus
                most[0] = max(most[0], in_use[0])
            ledger.retry(claim)  # some time passes
            with lock:
                in_use[0] -= vcpus
            ledger.release(claim)

    threads = [threading.Thread(target=work, args=(vcpus,)) for vcpus in (1, 2, 3, 0.5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most[0] <= 4
    assert ledger.used() == 0


@given(
    loads=st.dictionaries(st.integers(0, 63), st.floats(0, 1), min_size=8, max_size=16),
    vcpus=st.floats(0.01, 8),
)
def test_a_place_has_as_many_different_cores_as_it_needs(loads, vcpus):
    cores = place(loads, vcpus)
    assert len(cores) == len(set(cores))
    assert set(cores) <= loads.keys()
    assert vcpus - 1e-6 <= len(cores) < vcpus + 1 + 1e-6


@given(st.lists(st.tuples(st.sampled_from(["claim", "release", "retry"]), st.floats(0.1, 4)), max_size=40))
def test_no_history_of_claims_exceeds_the_machine(history):
    ledger = Ledger(MemoryBook(), cores=range(4), vcpus=4)
    claims = []
    for action, number in history:
        if action == "claim":
            claims.append(ledger.claim(number))
        elif claims:
            claim = claims[int(number * 1000) % len(claims)]
            if action == "release":
                ledger.release(claim)
                claims.remove(claim)
            else:
                ledger.retry(claim)
        held = sum(claim.vcpus for claim in claims if claim.granted)
        assert ledger.used() == pytest.approx(held)
        assert held <= 4 + 1e-6
    while claims:  # whoever waits gets its turn
        assert any(ledger.retry(claim) for claim in claims)
        done = next(claim for claim in claims if claim.granted)
        ledger.release(done)
        claims.remove(done)


def test_a_book_speaks_of_one_boot_and_one_space_of_process_ids(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    default_book()
    (path,) = (tmp_path / "prefect-slo").iterdir()
    assert Path("/proc/sys/kernel/random/boot_id").read_text()[:8] in path.name

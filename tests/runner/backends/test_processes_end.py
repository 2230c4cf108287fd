"""However the parent ends, its workers and what they started end with it; shared workers outlive who shares them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from prefect_slo.resources import Size
from prefect_slo.runner.backends.processes import ProcessBackend
from prefect_slo.runner.backends.protocol import Opened
from prefect_slo.runner.local.ledger import Ledger, MemoryBook

PARENT = """
    import cloudpickle, os, pathlib, queue, signal, subprocess, sys, time
    from prefect_slo.resources import Size
    from prefect_slo.runner.backends.processes import ProcessBackend
    from prefect_slo.runner.backends.protocol import Bundle, Outcome
    from prefect_slo.runner.local.ledger import FileBook, Ledger

    note, start, work = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]

    class Program:
        def open(self, emit):
            def run(item, payload):
                child = subprocess.Popen(["sleep", "600"])
                note.with_suffix(".part").write_text(f"{os.getpid()} {os.getppid()} {child.pid}")
                note.with_suffix(".part").rename(note)
                if work == "native":
                    sum(range(10**13))  # never lets another thread of its process run
                time.sleep(600)
                return Outcome(b"")
            return run

    if __name__ == "__main__":
        reports = queue.Queue()
        ledger = Ledger(FileBook(note.with_suffix(".json")), cores=range(4), vcpus=4)
        backend = ProcessBackend(start=start, ledger=ledger)
        for lease in (1, 2):
            backend.open(lease, Size(1, 256), reports.put)
            reports.get(timeout=30)
        backend.submit(1, Bundle(1, "program", cloudpickle.dumps(Program()), ((0, b""),)))
        while not note.exists():
            time.sleep(0.01)
"""


@pytest.fixture
def parent(tmp_path, start, eventually, alive):
    """Runs a parent whose worker is busy, with its last lines given; the parent, and all processes under it."""
    started = []

    def run(last_lines, work="sleep"):
        script, note = tmp_path / "parent.py", tmp_path / "note"
        script.write_text(textwrap.dedent(PARENT) + textwrap.indent(textwrap.dedent(last_lines), "    "))
        process = subprocess.Popen(
            [sys.executable, str(script), str(note), start, work],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's & ignores it
        )
        eventually(lambda: note.exists() or process.poll() is not None)
        assert note.exists(), process.stdout.read()
        below = {*descendants(process.pid), *(int(pid) for pid in note.read_text().split())} - {process.pid}
        started.extend([process.pid, *below])
        assert len(below) >= 3
        return process, below

    yield run
    for pid in filter(alive, started):
        os.kill(pid, signal.SIGKILL)


def descendants(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


@pytest.mark.parametrize("work", ["sleep", "native"])
def test_nothing_outlives_a_parent_that_is_killed(parent, start, alive, eventually, work):
    if (start, work) == ("spawn", "native"):
        pytest.skip("nobody but the worker's own threads watches over it where there is no zygote")
    process, below = parent("time.sleep(600)", work)
    process.kill()
    process.wait()
    eventually(lambda: not any(map(alive, below)))


def test_nothing_outlives_a_parent_that_is_killed_while_its_own_fork_holds_its_sockets(parent, alive, eventually):
    process, below = parent(
        """
        if not (fork := os.fork()):
            time.sleep(600)
            os._exit(0)
        print(fork, flush=True)
        time.sleep(600)
        """
    )
    fork = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        eventually(lambda: not any(map(alive, below - {fork})))
        assert alive(fork), "it holds them still"
    finally:
        os.kill(fork, signal.SIGKILL)


def test_nothing_outlives_a_parent_that_is_interrupted_twice(parent, alive, eventually):
    process, below = parent("print('ready', flush=True)\ntime.sleep(600)")
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(30)
    eventually(lambda: not any(map(alive, below)))


def test_an_interrupt_of_the_terminal_reaches_the_parent_alone(parent, alive):
    process, below = parent(
        """
        print('ready', flush=True)
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            print('interrupted', backend.pids, flush=True)
            time.sleep(600)
        """
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.readline().startswith("interrupted (")
    assert all(map(alive, below))


@pytest.mark.parametrize(("last_line", "status"), [("pass", 0), ("raise ValueError", 1), ("sys.exit(7)", 7)])
def test_a_parent_that_returns_or_fails_leaves_nothing_and_ends_soon(parent, alive, eventually, last_line, status):
    process, below = parent(last_line)
    assert process.wait(30) == status
    eventually(lambda: not any(map(alive, below)))


def test_a_fork_of_the_parent_does_not_end_its_workers(parent, alive, tmp_path):
    process, _ = parent(
        """
        child = os.fork()
        if not child:
            sys.exit(0)
        os.waitpid(child, 0)
        print('child ended', flush=True)
        time.sleep(600)
        """
    )
    assert process.stdout.readline() == "child ended\n"
    assert all(alive(int(pid)) for pid in (tmp_path / "note").read_text().split())


def test_a_zygote_that_dies_takes_its_workers_with_it_and_is_replaced(desk_on, ledger, eventually):
    desk = desk_on(ProcessBackend(ledger=ledger, start="zygote"))
    lease, idle = desk.open(), desk.open()
    zygote = desk.run(lease, lambda payload: os.getppid())[0]
    desk.submit(lease, lambda payload: time.sleep(600))
    os.kill(zygote, signal.SIGKILL)
    assert desk.lost(lease).reason == desk.lost(idle).reason == "died"
    again = desk.open()
    assert desk.run(again, lambda payload: os.getppid())[0] not in (zygote, os.getpid())


@pytest.fixture
def shared():
    """Makes backends on shared workers, with an environment that no other test shares."""
    made = []

    def make(**options):
        options = {"env": {"SHARED_BY": str(id(made))}, "start": "zygote"} | options
        made.append(ProcessBackend.shared(**options))
        return made[-1]

    yield make
    for backend in made:
        backend.shutdown()
    ProcessBackend.shutdown_all()


def test_shared_workers_stay_warm_from_one_user_to_the_next(shared, desk_of):
    one = desk_of(shared())
    first = one.opened(one.open(Size(1, 256)))
    one.backend.shutdown()
    two = desk_of(shared())
    second = two.opened(two.open(Size(1, 256)))
    assert (first.cold, second.cold, second.pid) == (True, False, first.pid)


def test_users_of_shared_workers_may_choose_the_same_ids_and_keys(shared, desk_of):
    one, two = desk_of(shared()), desk_of(shared())
    lease = one.open(Size(0.5, 256))
    assert two.open(Size(0.5, 256)) == lease == 1
    assert one.opened(1).pid != two.opened(1).pid
    assert one.run(1, lambda payload: "one") == ["one"]
    one.backend.close(1)
    again = two.open(Size(0.5, 256))
    assert two.opened(again).pid == one.opened(1).pid
    assert two.run(again, lambda payload: "two") == [
        "two"
    ]  # the program that key 0 named for the other user is not run


def test_one_user_leaving_ends_its_leases_and_no_one_elses(shared, desk_of):
    one, two = desk_of(shared()), desk_of(shared())
    busy, other = one.open(Size(0.5, 256)), two.open(Size(0.5, 256))
    one.submit(busy, lambda payload: time.sleep(600))
    one.backend.shutdown()
    assert one.lost(busy).reason == "cancelled"
    assert two.run(other, lambda payload: payload, [1]) == [1]


def test_other_environments_have_other_workers(shared, desk_of):
    blue, red = desk_of(shared(env={"COLOUR": "blue"})), desk_of(shared(env={"COLOUR": "red"}))
    seen = [desk.run(desk.open(Size(0.5, 256)), lambda payload: os.environ["COLOUR"]) for desk in (blue, red)]
    assert seen == [["blue"], ["red"]]


def test_idle_workers_end_after_a_while_and_the_pool_rests_and_wakes_again(desk_on, ledger, alive, eventually):
    desk = desk_on(ProcessBackend(ledger=ledger, start="zygote", idle_s=0.2))
    lease = desk.open()
    worker = desk.opened(lease).pid
    zygote = desk.run(lease, lambda payload: os.getppid())[0]
    desk.backend.close(lease)
    eventually(lambda: not alive(worker) and not alive(zygote))
    assert desk.opened(desk.open()).cold


def test_no_more_workers_are_kept_than_asked_for_and_the_least_used_goes_first(desk_on, ledger, alive, eventually):
    desk = desk_on(ProcessBackend(ledger=ledger, start="zygote", max_idle=2))
    leases = [desk.open(Size(1, 300 + n)) for n in range(3)]
    for lease in leases:
        desk.backend.close(lease)
    pids = [desk.opened(lease).pid for lease in leases]
    eventually(lambda: not alive(pids[0]))
    assert all(map(alive, pids[1:]))


def test_a_worker_ends_in_an_orderly_way_when_nothing_keeps_it(desk, tmp_path):
    def register(payload):
        import atexit

        atexit.register((tmp_path / "left").touch)

    desk.run(desk.open(), register)
    desk.backend.shutdown()
    assert (tmp_path / "left").exists()


def test_a_worker_that_does_not_leave_when_told_is_ended(desk_on, ledger, alive):
    def stay(payload):
        import threading

        threading.Thread(target=time.sleep, args=(600,)).start()

    desk = desk_on(ProcessBackend(ledger=ledger, start="zygote", grace_s=0.2))
    lease = desk.open()
    desk.run(lease, stay)
    desk.backend.shutdown()
    assert not alive(desk.opened(lease).pid)


def test_a_fork_of_the_parent_may_have_workers_of_its_own(parent):
    process, _ = parent(
        """
        child = os.fork()
        if not child:
            own = ProcessBackend.shared(start=start)
            own.open(1, Size(0.1, 256), reports.put)
            print(reports.get(timeout=30), flush=True)
            own.shutdown()
            sys.exit(0)
        print(os.waitpid(child, 0)[1], flush=True)
        """
    )
    assert process.stdout.readline().startswith("Opened(lease=1, cold=True")
    assert process.stdout.readline() == "0\n"


def test_importing_is_harmless_where_worker_processes_are_impossible():
    code = """
        import psutil, sys
        sys.platform = "win32"
        for name in ("fcntl", "resource", "prefect"):
            sys.modules[name] = None
        from prefect_slo.runner.backends.processes import ProcessBackend
        sys.exit(ProcessBackend.available())
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == 0
    assert ProcessBackend.available()


class FailingBook:
    """A book that can't be opened any more."""

    def __init__(self, error):
        self.error = error

    def edit(self):
        raise self.error


def test_a_ledger_that_cannot_be_asked_is_said_and_the_work_goes_on(desk_on, caplog):
    backend = ProcessBackend(ledger=Ledger(FailingBook(OSError("no space left")), cores=(0,)), start="zygote")
    desk = desk_on(backend)
    assert desk.run(desk.open(), lambda payload: payload, [1]) == [1]
    assert "no space left" in caplog.text


def test_a_lease_goes_without_its_share_where_whoever_holds_the_machine_never_lets_go(desk_on, caplog):
    ledger = Ledger(MemoryBook(), cores=(0,), vcpus=1)
    held = ledger.claim(1)
    desk = desk_on(ProcessBackend(ledger=ledger, start="zygote", patience_s=0.2))
    assert desk.run(desk.open(), lambda payload: payload, [1]) == [1]
    assert "It goes without one now" in caplog.text
    assert ledger.used() == 1
    ledger.release(held)
    assert ledger.claim(1).granted, "what went without no longer stands in line"


def test_when_the_pool_itself_fails_its_leases_are_lost_and_nothing_hangs(desk_on, caplog):
    desk = desk_on(ProcessBackend(ledger=Ledger(FailingBook(RuntimeError("a bug")), cores=(0,)), start="zygote"))
    assert desk.lost(desk.ask()).reason == "died"
    assert desk.lost(desk.ask()).reason == "start"
    assert "a bug" in caplog.text


def test_a_module_that_fails_to_import_is_left_to_the_code_that_needs_it(desk_on, ledger, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    desk = desk_on(ProcessBackend(ledger=ledger, start="zygote", preload=("broken", "does_not_exist", "wave")))
    assert desk.run(desk.open(), lambda payload: "wave" in sys.modules) == [True]


def test_a_process_that_ends_before_it_reports_is_a_failed_start(desk_on, ledger, monkeypatch, start):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    desk = desk_on(ProcessBackend(ledger=ledger, start=start))
    lost = desk.lost(desk.ask())
    assert lost.reason == "start"
    assert "exit status 1" in lost.detail


def test_a_sink_that_raises_is_logged_and_does_not_stop_the_others(desk_on, ledger, caplog, eventually):
    def bad(report):
        raise RuntimeError("a bad sink")

    desk = desk_on(ProcessBackend(ledger=ledger, start="zygote"))
    desk.backend.open(-1, Size(1, 256), bad)
    assert isinstance(desk.opened(desk.open()), Opened)
    eventually(lambda: "a bad sink" in caplog.text)

"""What a runner may rely on when bundles run in worker processes, forked and spawned ones."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import cloudpickle
import pytest

from prefect_slo.errors import InvalidValue
from prefect_slo.resources import Size
from prefect_slo.runner.backends.processes import ProcessBackend
from prefect_slo.runner.backends.protocol import Bundle, Chatter, Finished, Lost, Opened, Outcome, Progress
from prefect_slo.runner.local import cgroup, session

however_started = pytest.mark.parametrize("start", ["zygote"], indirect=True)
"""A worker's own loop and the pool's line to it are the same however it was started: these run with one way to start.

All that a start, an end or the surroundings of a process may change runs with both.
"""


def test_items_of_a_bundle_run_in_order_in_another_process(desk):
    lease = desk.open()
    results = desk.run(lease, lambda payload: (payload, __import__("os").getpid()), ["a", "b", "c"])
    assert [payload for payload, _ in results] == ["a", "b", "c"]
    assert {pid for _, pid in results} == {desk.opened(lease).pid}
    assert desk.opened(lease).pid != os.getpid()


@however_started
def test_reports_carry_measured_times_on_the_clock_of_this_process(desk):
    lease = desk.open()
    before = time.monotonic()
    bundle = desk.submit(lease, lambda payload: time.sleep(0.05), [b"", b""])
    finished = desk.wait_for(Finished, bundle=bundle)
    first, second = desk.items(bundle)
    assert before <= finished.received <= first.started < first.ended <= second.started < second.ended
    assert second.ended <= finished.ended <= time.monotonic()
    assert first.ended - first.started >= 0.05
    assert finished.peak_mb > 5


@however_started
def test_cpu_time_counts_work_and_not_waiting(desk):
    def work(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    lease = desk.open()
    desk.wait_for(Finished, bundle=(worked := desk.submit(lease, work, [0.1])))
    desk.wait_for(Finished, bundle=(slept := desk.submit(lease, lambda payload: time.sleep(0.1))))
    cpu = {report.bundle: report.cpu_s for report in desk.reports if isinstance(report, Finished)}
    assert cpu[worked] >= 0.1 > 0.05 > cpu[slept]


@however_started
def test_peak_memory_is_that_of_the_bundle_and_not_of_an_earlier_one(desk):
    lease = desk.open()
    desk.wait_for(Finished, bundle=(large := desk.submit(lease, lambda payload: len(bytearray(200 << 20)))))
    desk.wait_for(Finished, bundle=(small := desk.submit(lease, lambda payload: None)))
    peak = {report.bundle: report.peak_mb for report in desk.reports if isinstance(report, Finished)}
    assert peak[large] > 200 > peak[small]


@however_started
def test_a_program_is_opened_once_a_worker(desk):
    def open_(emit):
        opened = __import__("time").monotonic()
        return lambda item, payload: Outcome(cloudpickle.dumps(opened))

    class Program:
        def open(self, emit):
            return open_(emit)

    lease = desk.open()
    for bundle in (101, 102):
        desk.backend.submit(lease, Bundle(bundle, "program", cloudpickle.dumps(Program()), ((0, b""),)))
        desk.wait_for(Finished, bundle=bundle)
    assert desk.items(101)[0].outcome == desk.items(102)[0].outcome
    open_s = {report.bundle: report.open_s for report in desk.reports if isinstance(report, Finished)}
    assert open_s[101] > 0 == open_s[102]


@however_started
def test_a_worker_forgets_programs_and_is_sent_them_again(desk):
    lease = desk.open()
    steps = [lambda payload, n=n: n for n in range(70)]
    assert [desk.run(lease, step)[0] for step in steps] == list(range(70))
    assert desk.run(lease, steps[0]) == [0]


@however_started
def test_outcomes_travel_with_all_their_fields(desk):
    class Program:
        def open(self, emit):
            return lambda item, payload: Outcome(payload, True, "why", 1.5, 2.5)

    lease = desk.open()
    desk.backend.submit(lease, Bundle(9, "program", cloudpickle.dumps(Program()), ((7, b"x"),)))
    desk.wait_for(Finished, bundle=9)
    (report,) = desk.items(9)
    assert (report.item, report.outcome) == (7, Outcome(b"x", True, "why", 1.5, 2.5))


@however_started
def test_quick_items_are_told_while_a_slow_one_runs(desk, tmp_path):
    gate = tmp_path / "gate"

    def step(payload):
        while payload == b"slow" and not gate.exists():
            time.sleep(0.005)

    lease = desk.open()
    bundle = desk.submit(lease, step, [b"", b"", b"slow"])
    desk.wait_until(lambda: len(desk.items(bundle)) == 2)
    assert not any(isinstance(report, Finished) for report in desk.reports)
    gate.touch()
    desk.wait_for(Finished, bundle=bundle)
    assert len(desk.items(bundle)) == 3


@however_started
def test_chatter_keeps_its_place_among_outcomes_and_comes_from_any_thread(desk):
    class Program:
        def open(self, emit):
            import threading

            def run(item, payload):
                emit(b"in %d" % item)
                thread = threading.Thread(target=emit, args=(b"beside %d" % item,))
                thread.start()
                thread.join()
                return Outcome(b"out")

            return run

    lease = desk.open()
    desk.backend.submit(lease, Bundle(5, "chatty", cloudpickle.dumps(Program()), ((0, b""), (1, b""))))
    desk.wait_for(Finished, bundle=5)
    told = []
    for report in desk.reports:
        if isinstance(report, Chatter):
            told.append(report.payload)
        elif isinstance(report, Progress):
            told.extend(item.item for item in report.items)
    assert told == [b"in 0", b"beside 0", 0, b"in 1", b"beside 1", 1]


@however_started
def test_large_payloads_go_both_ways_at_once_and_hold_nobody_up(desk):
    big, small = desk.open(), desk.open()
    payloads = [os.urandom(30 << 20) for _ in range(3)]

    class Echo:
        def open(self, emit):
            return lambda item, payload: Outcome(payload)

    desk.backend.submit(big, Bundle(77, "echo", cloudpickle.dumps(Echo()), tuple(enumerate(payloads))))
    assert desk.run(small, lambda payload: payload, [1, 2]) == [1, 2]
    desk.wait_for(Finished, bundle=77)
    assert [report.outcome.payload for report in desk.items(77)] == payloads


def test_a_closed_lease_leaves_its_worker_warm_for_the_next_of_its_size(desk):
    first = desk.open(Size(1, 512))
    desk.backend.close(first)
    again, other = desk.open(Size(1, 512)), desk.open(Size(1, 640))
    assert desk.opened(first).cold
    assert desk.opened(first).start_s > 0
    assert not desk.opened(again).cold
    assert desk.opened(again).start_s == 0
    assert desk.opened(again).pid == desk.opened(first).pid
    assert desk.opened(other).cold


@pytest.mark.parametrize(
    ("end", "detail"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by signal 9"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "killed by signal 15"),
        (lambda: os._exit(3), "exit status 3"),
        (lambda: sys.exit(4), "exit status 4"),
    ],
)
def test_a_worker_that_dies_takes_one_item_with_it_and_says_which(desk, end, detail):
    lease = desk.open()
    bundle = desk.submit(lease, lambda payload: end() if payload == "end" else payload, ["a", "end", "b", "c"])
    lost = desk.lost(lease)
    assert (lost.reason, lost.detail, lost.running, lost.untouched) == ("died", detail, 1, (2, 3))
    assert [report.item for report in desk.items(bundle)] == [0]
    assert desk.run(desk.open(), lambda payload: payload, ["still here"]) == ["still here"]


def test_a_crash_in_native_code_is_told_by_its_signal(desk):
    lease = desk.open()
    desk.submit(lease, lambda payload: __import__("ctypes").string_at(8))
    assert desk.lost(lease).detail == f"killed by signal {int(signal.SIGSEGV)}"


@however_started
def test_a_program_that_breaks_its_promise_is_told_with_its_traceback(desk):
    lease = desk.open()
    desk.submit(lease, lambda payload: 1 / 0)
    lost = desk.lost(lease)
    assert lost.reason == "died"
    assert "ZeroDivisionError" in lost.detail
    assert lost.running == 0


@however_started
def test_a_program_that_does_not_open_is_a_failed_start_with_all_items_untouched(desk):
    lease = desk.open()
    desk.backend.submit(lease, Bundle(1, "none", b"not a pickle", ((4, b""), (5, b""))))
    lost = desk.lost(lease)
    assert (lost.reason, lost.running, lost.untouched) == ("start", None, (4, 5))
    assert "UnpicklingError" in lost.detail


@however_started
def test_an_item_that_overruns_is_ended_and_named(desk):
    lease = desk.open()
    bundle = desk.submit(lease, lambda payload: time.sleep(payload), [0, 60, 0], timeout_s=1.5)
    lost = desk.lost(lease)
    assert (lost.reason, lost.running, lost.untouched) == ("timeout", 1, (2,))
    assert "1.5 s" in lost.detail
    assert [report.item for report in desk.items(bundle)] == [0]


@however_started
def test_a_timeout_is_for_one_item_and_not_for_the_bundle(desk):
    lease = desk.open()
    bundle = desk.submit(lease, lambda payload: time.sleep(0.4), [b""] * 4, timeout_s=1.2)
    desk.wait_for(Finished, bundle=bundle)
    assert len(desk.items(bundle)) == 4


def test_a_hang_in_native_code_that_holds_the_interpreter_is_ended_too(desk):
    lease = desk.open()
    desk.submit(lease, lambda payload: sum(range(10**13)), timeout_s=1)
    assert desk.lost(lease).reason == "timeout"


def test_memory_beyond_the_size_ends_the_worker_and_tells_the_numbers(desk):
    def hoard(payload):
        held = []
        while True:
            held.append(bytearray(8 << 20))
            time.sleep(0.005)

    lease = desk.open(Size(1, 200))
    desk.submit(lease, hoard, [b"", b""])
    lost = desk.lost(lease)
    assert (lost.reason, lost.running, lost.untouched, lost.limit_mb) == ("memory", 0, (1,), 200)
    assert 200 < lost.peak_mb < 2000
    assert desk.run(desk.open(Size(1, 200)), lambda payload: payload, [1]) == [1]


def test_memory_that_leaps_between_two_looks_is_capped_by_the_kernel(desk, monkeypatch):
    group = cgroup.MemoryGroup.make(999_998)
    if group is None:
        pytest.skip("control groups can't be made here")
    group.close()
    watch = session.MemoryWatch
    monkeypatch.setattr(session, "MemoryWatch", lambda *told: watch(*told, interval_s=3))
    lease = desk.open(Size(1, 200))
    desk.submit(lease, lambda payload: len(b"x" * (4000 << 20)), [b"", b""])
    lost = desk.lost(lease)
    assert (lost.reason, lost.running, lost.untouched) == ("memory", 0, (1,))
    assert lost.peak_mb < 800


def test_memory_of_processes_that_user_code_starts_counts(desk):
    def start(payload):
        import subprocess

        hoard = "import time; held = bytearray(300 << 20); time.sleep(60)"
        subprocess.run([__import__("sys").executable, "-c", hoard])

    lease = desk.open(Size(1, 250))
    desk.submit(lease, start)
    lost = desk.lost(lease)
    assert lost.reason == "memory"
    assert lost.peak_mb > 250


def test_memory_shared_with_a_fork_counts_once(desk):
    def fork(payload):
        import os
        import time

        held = bytearray(os.urandom(1 << 20)) * 150
        child = os.fork()
        if not child:
            time.sleep(0.4)
            os._exit(0)
        os.waitpid(child, 0)
        return len(held) >> 20

    lease = desk.open(Size(1, 280))
    assert desk.run(lease, fork) == [150]


def test_a_size_below_what_an_idle_worker_holds_is_raised_to_what_it_needs(desk):
    lease = desk.open(Size(1, 1))
    assert desk.run(lease, lambda payload: payload, [1]) == [1]
    desk.submit(lease, lambda payload: os.kill(os.getpid(), 9))
    assert desk.lost(lease).limit_mb > 64


def test_a_worker_that_still_holds_most_of_its_memory_is_not_kept(desk):
    lean, bloated = desk.open(Size(1, 300)), desk.open(Size(1, 301))
    desk.run(lean, lambda payload: len(bytearray(180 << 20)))
    desk.run(bloated, lambda payload: setattr(__import__("sys"), "held", bytearray(180 << 20)))
    for lease in (lean, bloated):
        desk.backend.close(lease)
    assert not desk.opened(desk.open(Size(1, 300))).cold
    assert desk.opened(desk.open(Size(1, 301))).cold


def test_cancelling_ends_what_runs_by_force(desk):
    lease = desk.open()
    desk.submit(lease, lambda payload: time.sleep(60), [b"", b""])
    desk.backend.cancel(lease)
    lost = desk.lost(lease)
    assert lost.reason == "cancelled"
    assert lost.running in (0, None)
    assert 1 in lost.untouched


def test_a_lease_can_be_cancelled_before_it_has_a_worker_and_while_it_is_idle(desk):
    waiting = [desk.ask(Size(4, 256)) for _ in range(2)]
    for lease in waiting:
        desk.backend.cancel(lease)
        assert desk.lost(lease).reason == "cancelled"
    idle = desk.open()
    desk.backend.cancel(idle)
    assert desk.lost(idle).reason == "cancelled"


def test_a_loss_says_which_bundle_it_took_and_a_later_one_is_not_started(desk, tmp_path):
    idle, busy = desk.open(), desk.open()
    os.kill(desk.opened(idle).pid, signal.SIGKILL)
    assert desk.lost(idle).bundle is None
    desk.submit(idle, lambda payload: (tmp_path / "ran").touch())
    bundle = desk.submit(busy, lambda payload: os._exit(1))
    assert desk.lost(busy).bundle == bundle
    assert not (tmp_path / "ran").exists()
    assert sum(isinstance(report, Lost) for report in desk.reports) == 2


@however_started
def test_a_busy_or_unknown_lease_is_refused(desk):
    lease = desk.open()
    desk.submit(lease, lambda payload: time.sleep(60))
    with pytest.raises(InvalidValue, match="runs nothing"):
        desk.submit(lease, lambda payload: None)
    with pytest.raises(InvalidValue, match="not closed"):
        desk.submit(999, lambda payload: None)


@however_started
def test_what_the_machine_can_never_hold_is_refused_at_once(desk):
    for size, word in ((Size(64, 512), "vcpus"), (Size(1, 10**9), "memory_mb"), (Size(1, 512, 64, "gpu"), "64 GPU")):
        lost = desk.lost(desk.ask(size))
        assert lost.reason == "start"
        assert word in lost.detail


@however_started
def test_leases_beyond_the_machine_wait_their_turn(desk):
    holders = [desk.open(Size(2, 256)) for _ in range(2)]
    waiting = desk.ask(Size(2, 256))
    assert desk.run(holders[0], lambda payload: payload, [1]) == [1]
    assert not any(isinstance(report, Opened) and report.lease == waiting for report in desk.reports)
    desk.backend.close(holders[1])
    assert desk.opened(waiting).wait_s > 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
def test_a_worker_has_the_cores_and_threads_of_its_size(ledger, start, desk):
    def look(payload):
        variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")
        return os.sched_getaffinity(0), {os.environ[name] for name in variables}

    one, other = desk.open(Size(1, 300)), desk.open(Size(0.5, 301))
    cores, threads = desk.run(one, look)[0]
    others, _ = desk.run(other, look)[0]
    assert threads == {"1"}
    assert len(cores) == len(others) == 1
    if (os.cpu_count() or 1) > 1:
        assert cores != others
    two = desk.open(Size(2, 302))
    assert desk.run(two, look)[0][1] == {"2"}


def test_native_threads_are_held_to_the_size_whether_libraries_were_loaded_before_or_are_later(desk_on, start, ledger):
    def look(payload):
        import numpy
        import threadpoolctl

        numpy.ones((200, 200)) @ numpy.ones((200, 200))
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]

    for preload in ((), ("numpy",)):
        desk = desk_on(ProcessBackend(ledger=ledger, start=start, preload=preload))
        for vcpus in (1, 2):
            lease = desk.open(Size(vcpus, 512))
            assert desk.run(lease, look) == [[min(vcpus, os.cpu_count())]]
            desk.backend.close(lease)


def test_workers_stand_where_the_parent_stands_when_the_lease_is_asked_for(desk, tmp_path, monkeypatch):
    def look(payload):
        return os.getcwd(), os.environ.get("COLOUR"), "/nowhere/in/particular" in __import__("sys").path

    first = desk.open()
    desk.run(first, look)
    desk.backend.close(first)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLOUR", "blue")
    monkeypatch.syspath_prepend("/nowhere/in/particular")
    again = desk.open()
    assert not desk.opened(again).cold
    assert desk.run(again, look) == [(str(tmp_path), "blue", True)]
    cold = desk.open(Size(1, 300))
    assert desk.run(cold, look) == [(str(tmp_path), "blue", True)]


def test_workers_never_import_the_users_main_module(desk):
    lease = desk.open()
    name = desk.run(lease, lambda payload: getattr(__import__("__main__"), "__file__", None))
    assert name == [None]


def test_items_run_in_the_main_thread_so_that_signals_work(desk):
    def alarm(payload):
        import signal
        import time

        def ring(number, frame):
            raise TimeoutError

        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(30)
        except TimeoutError:
            return "rang"

    assert desk.run(desk.open(), alarm) == ["rang"]


def test_what_user_code_started_ends_with_its_worker(desk, tmp_path, alive, eventually):
    note = tmp_path / "pid"

    def start(payload):
        import subprocess

        process = subprocess.Popen(["sleep", "600"])
        note.write_text(str(process.pid))
        process.wait()

    lease = desk.open()
    desk.submit(lease, start)
    eventually(lambda: note.exists() and note.read_text() != "")
    child = int(note.read_text())
    assert alive(child)
    desk.backend.cancel(lease)
    desk.lost(lease)
    eventually(lambda: not alive(child))


def test_processes_that_outlive_an_item_do_not_hide_its_workers_end(desk):
    def leave_one_behind(payload):
        import os
        import time

        if not os.fork():
            time.sleep(600)
        os._exit(5)

    lease = desk.open()
    desk.submit(lease, leave_one_behind)
    assert desk.lost(lease).detail == "exit status 5"


def test_a_worker_that_closes_its_line_is_ended(desk):
    lease = desk.open()
    desk.submit(lease, lambda payload: os.closerange(3, 65536))
    assert desk.lost(lease).reason == "died"


def test_random_numbers_differ_between_workers(desk):
    leases = [desk.open() for _ in range(2)]
    drawn = [desk.run(lease, lambda payload: __import__("random").random())[0] for lease in leases]
    assert drawn[0] != drawn[1]


def test_output_of_workers_goes_where_the_parents_goes(desk, capfd, eventually):
    desk.run(desk.open(), lambda payload: print("printed by an item"))
    assert "printed by an item" in capfd.readouterr().out


def test_shutdown_ends_busy_idle_and_waiting_leases_and_is_repeatable(desk):
    busy, idle, waiting = desk.open(Size(2, 256)), desk.open(Size(1, 256)), desk.ask(Size(3, 256))
    desk.submit(busy, lambda payload: time.sleep(600))
    desk.backend.shutdown()
    assert {desk.lost(lease).reason for lease in (busy, idle, waiting)} == {"cancelled"}
    desk.backend.shutdown()
    assert desk.lost(desk.ask()).reason == "start"


def test_a_module_that_starts_threads_rules_the_zygote_out_and_not_the_work(desk_on, ledger, tmp_path, monkeypatch):
    (tmp_path / "restless.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    desk = desk_on(ProcessBackend(ledger=ledger, preload=("restless",), start="zygote"))
    for lease in (desk.open(), desk.open()):
        loaded, parent = desk.run(lease, lambda payload: ("restless" in sys.modules, os.getppid()))[0]
        assert loaded
        assert "restless" not in Path(f"/proc/{parent}/cmdline").read_text()

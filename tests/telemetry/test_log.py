from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from prefect_slo.errors import InvalidObservation
from prefect_slo.observation import Invocation, StageRun
from prefect_slo.telemetry import RunLog, StageKey, read_log
from prefect_slo.telemetry.log import SUFFIX

ROW = StageRun("r1", "train", 4, 1024, 1.0, 2.5, compute_s=2.0, items=40)
KEY = StageKey("train", "1a2b3c4d")


def test_a_closed_log_reads_back_as_it_was_written(tmp_path, invocation):
    log = RunLog("demo", "r1", tmp_path, facts={"mode": "observe"})
    log.invocation(invocation)
    log.stage_run(ROW, KEY, knobs={"resolution": 720}, features={"frames": 300})
    log.workflow({"name": "demo", "stages": [{"name": "train"}]})
    log.note(mode="enforce")
    log.end("completed", latency_s=3.25, driver_s=0.5)
    log.close()

    record = read_log(log.path)

    assert record.run_id == "r1"
    assert (record.status, record.latency_s) == ("completed", 3.25)
    assert record.invocations == (invocation,)
    (stage,) = record.stages
    assert (stage.key, stage.status) == (KEY, "completed")
    assert (stage.knobs, stage.features) == ({"resolution": 720}, {"frames": 300})
    np.testing.assert_equal(vars(stage.row), vars(ROW))
    assert record.workflow["stages"] == [{"name": "train"}]
    assert (record.facts["mode"], record.facts["driver_s"]) == ("enforce", 0.5)
    assert record.facts["machine"]["vcpus"] >= 1
    assert record.training == (stage,)


def test_a_log_without_an_end_is_of_a_crashed_run_that_trains_nothing(tmp_path):
    log = RunLog("demo", "r1", tmp_path)
    log.stage_run(ROW, KEY)
    log.close()
    record = read_log(log.path)
    assert (record.status, len(record.stages), record.training) == ("crashed", 1, ())
    assert math.isnan(record.latency_s)


def test_later_attempts_of_a_flow_run_are_runs_of_their_own(tmp_path):
    logs = [RunLog("demo", "r1", tmp_path, attempt=attempt) for attempt in (1, 2)]
    assert [log.run_id for log in logs] == ["r1", "r1#2"]
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 2
    for log in logs:
        log.discard()
    assert list(tmp_path.iterdir()) == []


def test_every_prefix_of_a_log_is_readable(tmp_path, invocation):
    log = RunLog("demo — ä", "r1", tmp_path, facts={"note": "line\nfeed"})
    for _ in range(3):
        log.invocation(invocation)
    log.stage_run(ROW, KEY)
    log.end("failed", latency_s=1.0)
    log.close()
    data, cut = log.path.read_bytes(), tmp_path / "cut"
    first = data.index(b"\n") + 1
    for length in range(len(data) + 1):
        cut.write_bytes(data[:length])
        record = read_log(cut)
        assert (record is None) == (length < first)
        if record is not None:
            assert "damaged_lines" not in record.facts
            assert record.status == ("failed" if length == len(data) else "crashed")
            assert len(record.invocations) <= 3


def test_damaged_lines_are_left_out_and_counted(tmp_path, invocation):
    log = RunLog("demo", "r1", tmp_path)
    log.invocation(invocation)
    log.close()
    data = log.path.read_bytes()
    log.path.write_bytes(data + b'\x00\xff\x00\n{"t":"stage","row":{}}\n[1]\n{"t":"end","status":"odd"}\n')
    record = read_log(log.path)
    assert record.invocations == (invocation,)
    assert record.facts["damaged_lines"] == 4


def test_a_directory_that_cannot_be_written_costs_one_warning_and_no_record(tmp_path, invocation, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    log = RunLog("demo", "r1", blocked / "below")
    log.invocation(invocation)
    log.end("completed", latency_s=1.0)
    record = log.record()
    assert (record.invocations, record.status) == ((invocation,), "completed")
    assert sum("stays in memory" in message for message in caplog.messages) == 1


def test_an_unknown_status_is_refused(tmp_path):
    log = RunLog("demo", "r1", tmp_path)
    with pytest.raises(InvalidObservation, match="'done'"):
        log.end("done")
    log.discard()


def test_threads_write_whole_lines(tmp_path):
    log = RunLog("demo", "r1", tmp_path)
    writers = [
        threading.Thread(target=lambda w=w: [log.invocation(Invocation("s", w, i + 1, 1.0)) for i in range(300)])
        for w in range(6)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    log.close()
    record = read_log(log.path)
    assert sorted((i.worker, i.items) for i in record.invocations) == [(w, i + 1) for w in range(6) for i in range(300)]


WRITER = """
import os, sys
from prefect_slo.observation import Invocation, StageRun
from prefect_slo.telemetry import RunLog, StageKey
for directory in sys.stdin:
    if child := os.fork():
        os.waitpid(child, 0)
        print("gone", flush=True)
        continue
    log = RunLog("demo", "r1", directory.strip())
    print(os.getpid(), flush=True)
    for number in range(10**7):
        log.invocation(Invocation("train", number % 4, number + 1, 1.0, compute_s=0.1))
        if number % 50 == 49:
            log.stage_run(StageRun("r1", "train", 4, 1024, 1.0, 2.0, items=number + 1), StageKey("train", "v1"))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_process_killed_at_any_moment_leaves_a_readable_log(tmp_path):
    rng = np.random.default_rng(7)
    (tmp_path / "writer.py").write_text(WRITER)
    writers = subprocess.Popen(
        [sys.executable, str(tmp_path / "writer.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    for number, delay in enumerate(rng.uniform(0.0, 0.02, 20)):
        writers.stdin.write(f"{tmp_path / str(number)}\n")
        pid = int(writers.stdout.readline())
        threading.Event().wait(delay)
        os.kill(pid, signal.SIGKILL)
        assert writers.stdout.readline() == "gone\n"
        (path,) = (tmp_path / str(number)).glob(f"*{SUFFIX}")
        record = read_log(path)
        assert (record.run_id, record.status) == ("r1", "crashed")
        assert "damaged_lines" not in record.facts
        assert [i.items for i in record.invocations] == list(range(1, len(record.invocations) + 1))
        assert len(record.stages) in (len(record.invocations) // 50, len(record.invocations) // 50 - 1)
    writers.communicate(timeout=60)
    assert writers.returncode == 0

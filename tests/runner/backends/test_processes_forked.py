"""A process that is alone with its main thread makes a fork of itself the zygote of the pool that it will have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PARENT = """
    import atexit, cloudpickle, json, os, pathlib, queue, sys, threading, time
    from prefect_slo.resources import Size
    from prefect_slo.runner.backends.processes import ProcessBackend
    from prefect_slo.runner.backends.protocol import Bundle, Finished, Lost, Outcome, Progress
    from prefect_slo.runner.local.launch import Forker
    from prefect_slo.runner.local.ledger import Ledger, MemoryBook

    note, secrets = pathlib.Path(sys.argv[1]), ["for this process alone"]
    zygote = Forker.forked(("wave",), secrets.clear)
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()  # from now on it may have others
    beside_threads = Forker.forked((), secrets.clear)

    class Program:
        def open(self, emit):
            def run(item, payload):
                if payload == b"die":
                    os._exit(9)
                atexit.register(note.with_suffix(".left").touch)
                seen = {
                    "process": os.getpid(), "zygote": os.getppid(), "wave": "wave" in sys.modules,
                    "secrets": sys.modules["__main__"].secrets, "stdin": sys.stdin.read(),
                }
                note.with_suffix(".part").write_text(json.dumps(seen))
                note.with_suffix(".part").rename(note)
                if payload == b"stay":
                    sum(range(10**13))  # never lets another thread of its process run
                return Outcome(b"")
            return run

    reports = queue.Queue()
    backend = ProcessBackend(ledger=Ledger(MemoryBook(), cores=range(4), vcpus=4), zygote=zygote)

    def run(lease, payload):
        backend.open(lease, Size(1, 512), reports.put)
        reports.get(timeout=60)
        backend.submit(lease, Bundle(lease, "program", cloudpickle.dumps(Program()), ((0, payload),)))
        while not isinstance(report := reports.get(timeout=60), Finished | Lost):
            pass
        print(type(report).__name__, getattr(report, "detail", ""), flush=True)
"""


@pytest.fixture
def parent(tmp_path: Path, alive: Any) -> Iterator[Callable[[str], tuple[subprocess.Popen[str], Path]]]:
    """Runs a parent with its last lines given."""
    started: list[subprocess.Popen[str]] = []

    def run(last_lines: str) -> tuple[subprocess.Popen[str], Path]:
        script, note = tmp_path / "parent.py", tmp_path / "note"
        script.write_text(textwrap.dedent(PARENT) + textwrap.dedent(last_lines))
        command = [sys.executable, str(script), str(note)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True))
        return started[-1], note

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_workers_come_from_the_fork_and_find_what_it_had_imported_and_nothing_that_was_to_be_forgotten(parent, alive):
    process, note = parent(
        """
        run(1, b"")
        print(note.read_text(), os.getpid(), secrets, beside_threads)
        print(zygote._process.pid, zygote._process.cmdline() == [sys.executable, *sys.orig_argv[1:]])
        backend.shutdown()
        print("end")
        """
    )
    first, seen, of_zygote, *rest = process.communicate(timeout=60)[0].splitlines()
    assert first == "Finished "
    zygote, same_command = of_zygote.split()
    assert f'"zygote": {zygote}, "wave": true, "secrets": [], "stdin": ""' in seen
    assert seen.endswith("['for this process alone'] None"), "the parent lost nothing, and is not forked beside threads"
    assert same_command == "True"
    assert rest == ["end"], "neither the zygote nor a worker goes on with the parent's script"
    assert note.with_suffix(".left").exists(), "a worker's exit handlers run"
    assert not alive(int(zygote))


def test_a_worker_of_the_fork_that_dies_is_lost_and_replaced(parent):
    process, _ = parent("run(1, b'die')\nrun(2, b'')\nbackend.shutdown()")
    assert process.communicate(timeout=60)[0].splitlines() == ["Lost exit status 9", "Finished "]


def test_the_fork_and_its_workers_end_with_their_parent(parent, alive, eventually):
    process, note = parent("run(1, b'stay')")
    eventually(note.exists)
    zygote = int(note.read_text().split('"zygote": ')[1].split(",")[0])
    assert alive(zygote)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    eventually(lambda: not alive(zygote))

"""Flows whose workers come to harm, and what the API says of them afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import psutil
import pytest
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_slo.runner.task_runner import SLOTaskRunner

SETTLE_S = 120.0
Recorded = Callable[[UUID, int], "Counter[tuple[str, str]]"]


@pytest.fixture
def run_isolated(prefect_server: str) -> Callable[..., State[Any]]:
    """Runs a flow on worker processes; its final state."""

    def run(flow: Flow[..., Any], *args: Any, runner: SLOTaskRunner | None = None) -> State[Any]:
        runner = runner or SLOTaskRunner(isolation="process", max_workers=2)
        return flow.with_options(task_runner=runner)(*args, return_state=True)

    return run


@pytest.fixture
def recorded(prefect_server: str) -> Recorded:
    """The task runs of a flow run as the API has them in the end: how many of each task are in each state."""

    def read(flow_run_id: UUID, expected: int) -> Counter[tuple[str, str]]:
        deadline = time.monotonic() + SETTLE_S
        with get_client(sync_client=True) as client:
            while True:
                runs = client.read_task_runs(
                    flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])), limit=200
                )
                found = Counter((re.sub(r"-[0-9a-f]{3}$", "", run.name), str(run.state_name)) for run in runs)
                unsettled = any(name in ("Pending", "Running", "None") for _, name in found)
                if (len(runs) >= expected and not unsettled) or time.monotonic() > deadline:
                    return found
                time.sleep(0.1)

    return read


class Program:
    """A Python program that runs a flow in a process of its own."""

    def __init__(self, path: Path, source: str, api_url: str) -> None:
        path.write_text(source)
        env = os.environ | {
            "PREFECT_API_URL": api_url,
            "PREFECT_LOGGING_LEVEL": "ERROR",
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(path)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.family: list[psutil.Process] = []

    def wait_for(self, path: Path) -> None:
        """Wait until the flow has come as far as making this file, and note the processes that it has by then."""
        deadline = time.monotonic() + 60
        while not path.exists():
            assert self.process.poll() is None, self.process.communicate()[1][-2000:]
            assert time.monotonic() < deadline, "the flow never got there"
            time.sleep(0.02)
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        assert self.family, "it has no worker processes"

    def end(self, timeout_s: float) -> float:
        """Wait for its end; seconds that it took."""
        began = time.monotonic()
        self.process.communicate(timeout=timeout_s)
        return time.monotonic() - began

    def orphans(self, patience_s: float = 10.0) -> list[psutil.Process]:
        """Processes of it that are still there after a while."""
        _, alive = psutil.wait_procs(self.family, timeout=patience_s)
        return alive


@pytest.fixture
def program(tmp_path: Path, prefect_server: str) -> Iterator[Callable[[str], Program]]:
    """Starts programs; whatever is left of them ends with the test."""
    started: list[Program] = []

    def start(source: str) -> Program:
        started.append(Program(tmp_path / f"program_{len(started)}.py", source, prefect_server))
        return started[-1]

    yield start
    for one in started:
        for process in one.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        one.process.kill()
        one.process.wait()


class Wire:
    """A TCP relay to a server that can be cut and mended."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.cut = False
        self.severed = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def break_off(self) -> None:
        """End every connection, and refuse new ones."""
        with self._lock:
            self.cut = True
            self.severed += len(self._open)
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.cut = False

    def close(self) -> None:
        self.break_off()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.cut:
                client.close()
            else:
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            with self._lock:
                self._open |= {client, server}
            with contextlib.suppress(OSError):
                while True:
                    for source in select.select([client, server], [], [])[0]:
                        data = source.recv(65536)
                        if not data:
                            return
                        (server if source is client else client).sendall(data)
        with self._lock:
            self._open -= {client, server}


@pytest.fixture
def wire(prefect_server: str) -> Iterator[Wire]:
    address = urlsplit(prefect_server)
    assert address.hostname is not None
    assert address.port is not None
    wire = Wire(address.hostname, address.port)
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{wire.port}/api"}):
        yield wire
    wire.close()

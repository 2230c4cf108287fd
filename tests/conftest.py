"""What tests of several folders share: one Prefect server per session, and repeatable Hypothesis runs."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# A server that writes events down one by one keeps SQLite busy, and answers "database is locked" to flows under test.
os.environ.setdefault("PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE", "100")
os.environ.setdefault("PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE", "100")
os.environ.setdefault("PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL", "1")  # below 1 it never sleeps
os.environ.setdefault("PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED", "false")  # nobody reads them here
os.environ.setdefault("PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED", "false")  # nothing here is automated
# Whoever finds a lease taken asks again after this long, not after what its holders take on average.
os.environ.setdefault("PREFECT_SERVER_CONCURRENCY_MAXIMUM_CONCURRENCY_SLOT_WAIT_SECONDS", "0.1")

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end: the garbage collector need not look through it again and again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def slo_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Logs of runs under way and the ledger of vCPUs lie in folders of the session, never in the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path_factory.mktemp("slo-home")))
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield


@pytest.fixture(scope="session")
def one_authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A file of one certificate authority, for this process and those that it starts.

    Every client of the API reads all authorities anew, which takes it longer than a request; on loopback none is asked.
    """
    import certifi

    end = "-----END CERTIFICATE-----\n"
    path = tmp_path_factory.mktemp("authorities") / "one.pem"
    path.write_text(Path(certifi.where()).read_text(encoding="utf-8").partition(end)[0] + end, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_SSL_CERT_FILE", str(path))
        yield str(path)


@pytest.fixture(scope="session")
def soon_again() -> Iterator[None]:
    """Flows under test come back soon where SQLite was busy for a moment; Prefect's clients wait for 2 s and more."""
    from prefect.client import base

    from prefect_slo.telemetry import api

    async def hook(response: Any) -> None:
        api.soon_again(response)

    def hooked(init: Callable[..., None], hook: Callable[[Any], Any]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, **options: Any) -> None:
            init(self, *args, **options)
            self.event_hooks["response"].append(hook)

        return __init__

    with pytest.MonkeyPatch.context() as patch:
        for kind, told in ((base.PrefectHttpxSyncClient, api.soon_again), (base.PrefectHttpxAsyncClient, hook)):
            patch.setattr(kind, "__init__", hooked(kind.__init__, told))
        yield


@pytest.fixture(scope="session")
def prefect_server(one_authority: str, soon_again: None) -> Iterator[str]:
    """URL of a real Prefect server on a temporary SQLite database; the settings of this process point at it."""
    from prefect.settings import (
        PREFECT_API_SSL_CERT_FILE,
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_LOGGING_LEVEL,
        PREFECT_LOGGING_TO_API_ENABLED,
        PREFECT_SERVER_ANALYTICS_ENABLED,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness

    from prefect_slo.loop.background import settle

    quiet = {
        PREFECT_API_SSL_CERT_FILE: one_authority,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # stopping it takes up to a second a run
        PREFECT_LOGGING_LEVEL: "WARNING",
        PREFECT_LOGGING_TO_API_ENABLED: False,
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
    }
    with temporary_settings(quiet), contextlib.ExitStack() as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", _memory() or tempfile.tempdir)  # the database is made there
            server.enter_context(prefect_test_harness(server_startup_timeout=240))
        yield str(PREFECT_API_URL.value())
        settle(30)  # what the last flows have left to learn is learned while there is a server


def _memory() -> str | None:
    """A folder in memory with room for a database: on a disk that is busy, or slow, all that tests do waits for it."""
    folder = "/dev/shm"
    return folder if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 1 << 30 else None


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that can't reach the API tries as often as it does, and again at once rather than after seconds."""
    import httpcore
    from prefect.client import base

    monkeypatch.setattr(httpcore.NetworkBackend, "sleep", lambda *_: None)  # between connections
    monkeypatch.setattr(base, "time", SimpleNamespace(**{**vars(time), "sleep": lambda _: None}))  # between requests


@contextlib.contextmanager
def _process_pools(address: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Makes a work pool of that name, and a real worker that starts jobs on this machine; returns the worker.

    Both have the environment of this process and what is given by name; they are quiet unless that says otherwise.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    from prefect_slo.runner.work_pools import shut_offices

    workers: list[subprocess.Popen[bytes]] = []

    def make(name: str, **environment: str) -> subprocess.Popen[bytes]:
        with get_client(sync_client=True) as client, contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        quiet = {
            "PREFECT_API_URL": address,
            "PREFECT_WORKER_QUERY_SECONDS": "0.5",
            "PREFECT_WORKER_HEARTBEAT_SECONDS": "2",
            "PREFECT_LOGGING_LEVEL": "WARNING",
            "PREFECT_LOGGING_TO_API_ENABLED": "false",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", name]
        worker = subprocess.Popen(
            command,
            env={**os.environ, **quiet, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where pytest runs in background
        )
        workers.append(worker)
        return worker

    yield make
    shut_offices()
    for worker in workers:
        worker.send_signal(signal.SIGINT)
    for worker in workers:
        worker.wait(60)


@pytest.fixture(scope="module")
def process_pool(prefect_server: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Makes work pools with real workers, see ``_process_pools``; they end with the module, as each keeps asking."""
    with _process_pools(prefect_server) as make:
        yield make


@pytest.fixture
def own_process_pool(prefect_server: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """The same for one test: its workers end with it."""
    with _process_pools(prefect_server) as make:
        yield make

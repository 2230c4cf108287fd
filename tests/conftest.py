"""What tests of several folders share: one Prefect server per session, and repeatable Hypothesis runs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# A server that writes events down one by one keeps SQLite busy, and answers "database is locked" to flows under test.
for _service in ("TASK_RUN_RECORDER", "EVENT_PERSISTER"):
    os.environ.setdefault(f"PREFECT_SERVER_SERVICES_{_service}_BATCH_SIZE", "100")
    os.environ.setdefault(f"PREFECT_SERVER_SERVICES_{_service}_READ_BATCH_SIZE", "100")
os.environ.setdefault("PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL", "1")  # below 1 it never sleeps

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def slo_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Logs of runs under way and the ledger of vCPUs lie in folders of the session, never in the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path_factory.mktemp("slo-home")))
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """URL of a real Prefect server on a temporary SQLite database; the settings of this process point at it."""
    from prefect.settings import (
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
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # stopping it takes up to a second a run
        PREFECT_LOGGING_LEVEL: "WARNING",
        PREFECT_LOGGING_TO_API_ENABLED: False,
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
    }
    with temporary_settings(quiet), prefect_test_harness(server_startup_timeout=240):
        yield str(PREFECT_API_URL.value())
        settle(30)  # what the last flows have left to learn is learned while there is a server


@pytest.fixture(scope="session")
def process_pool(prefect_server: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Makes a work pool of that name, and a real worker that starts jobs on this machine; returns the worker.

    Both have the environment of this process and what is given by name; they are quiet unless that says otherwise.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    workers: list[subprocess.Popen[bytes]] = []

    def make(name: str, **environment: str) -> subprocess.Popen[bytes]:
        with get_client(sync_client=True) as client, contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        quiet = {
            "PREFECT_API_URL": prefect_server,
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
    from prefect_slo.runner.work_pools import shut_offices

    shut_offices()
    for worker in workers:
        worker.send_signal(signal.SIGINT)
    for worker in workers:
        worker.wait(60)

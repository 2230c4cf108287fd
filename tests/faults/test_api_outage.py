"""Prefect's API goes away while a flow runs, and comes back: the flow and its records are whole."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from prefect import flow, task
from prefect.settings import PREFECT_API_URL, temporary_settings


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


@task
def nap(x: int) -> int:
    time.sleep(0.2)
    return x


@flow
def naps(n: int) -> list[int]:
    return nap.map(range(n)).result()


def test_a_flow_outlives_an_outage_of_the_api_and_nothing_is_missing(run_isolated, wire, recorded):
    assert run_isolated(naps, 2).is_completed()  # workers are warm, so that the outage comes while items run
    threading.Timer(0.5, wire.break_off).start()
    threading.Timer(3.0, wire.mend).start()
    state = run_isolated(naps, 12)
    assert wire.severed > 0
    assert state.result() == list(range(12))
    assert recorded(state.state_details.flow_run_id, 12) == Counter({("nap", "Completed"): 12})

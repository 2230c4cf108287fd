"""Our clients of the API come back soon where a server was busy, and wait as long as it says where it says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from prefect.client import base
from prefect.context import SyncClientContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, PREFECT_CLIENT_RETRY_JITTER_FACTOR
from prefect.settings import temporary_settings as settings

from prefect_slo.telemetry.api import api_client

SOON = [0.1, 0.1, 0.2, 0.4, 0.8, *[1.0] * 9]


class Busy(BaseHTTPRequestHandler):
    """Refuses as often as it is told to, with the headers that it is told."""

    refusals: int
    headers_told: dict[str, str]

    def do_GET(self) -> None:
        refused = type(self).refusals > 0
        type(self).refusals -= refused
        self.send_response(503 if refused else 200)
        for name, value in self.headers_told.items() if refused else ():
            self.send_header(name, value)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("told", "retries", "waits"),
    [
        ({}, 5, [*SOON, 2, 4, 8, 16, 32]),  # then as often and as long as Prefect's client waits
        ({}, 1, [*SOON, 2]),
        ({"Retry-After": "7"}, 5, [7] * 5),
    ],
)
def test_a_refused_request_is_made_again_soon_unless_the_server_says_when(
    monkeypatch: pytest.MonkeyPatch, address: str, told: dict[str, str], retries: int, waits: list[float]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(base, "time", SimpleNamespace(**{**vars(time), "sleep": slept.append}))
    Busy.refusals, Busy.headers_told = len(waits), told
    chosen = {PREFECT_API_URL: address, PREFECT_CLIENT_MAX_RETRIES: retries, PREFECT_CLIENT_RETRY_JITTER_FACTOR: 0}
    with settings(chosen), api_client() as client:
        assert client.request("GET", "/health").status_code == 200
    assert slept == pytest.approx(waits)


def test_within_a_flow_run_its_own_client_serves_unless_another_one_is_asked_for(prefect_server: str) -> None:
    with SyncClientContext() as open_already, api_client() as client, api_client(own=True) as other:
        assert client is open_already.client
        assert other is not client


def test_a_client_that_is_told_to_try_once_does(address: str) -> None:
    Busy.refusals, Busy.headers_told = 1, {}
    with settings({PREFECT_API_URL: address, PREFECT_CLIENT_MAX_RETRIES: 0}), api_client() as client:
        with pytest.raises(PrefectHTTPStatusError, match="503"):
            client.request("GET", "/health")
        assert client.request("GET", "/health").status_code == 200

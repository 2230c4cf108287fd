"""Addresses at which there is no API of Prefect: a page, or a server that is asked at its root."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_slo.cli.api_trouble import api_trouble


class Page(BaseHTTPRequestHandler):
    """Gives everybody the same page, as the web interface of Prefect's server does, and takes nothing."""

    def do_GET(self) -> None:
        if self.path.startswith("/csrf-token"):  # without which clients go on
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(b"<!DOCTYPE html>")

    def do_POST(self) -> None:
        self.send_error(405)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    serving.join()
    server.server_close()


@pytest.mark.parametrize(
    ("arguments", "answers"),
    [
        (
            ["report", "letters"],
            "answers GET /block_types/slug/slo-profile/block_documents/name/letters with text/html",
        ),
        (["refit", "letters"], "answers 405 Method Not Allowed to POST /artifacts/latest/filter"),
    ],
)
def test_a_page_in_place_of_the_api_is_told_with_the_address_that_is_meant(
    run, page: str, arguments: list[str], answers: str
) -> None:
    with temporary_settings({PREFECT_API_URL: page}):
        answer = run(*arguments)
    assert answer.code == 1
    [told] = answer.err.splitlines()
    assert f"{page} {answers}" in told
    assert told.endswith(f"prefect config set PREFECT_API_URL={page}/api")


def test_what_a_run_makes_of_such_an_answer_is_told_by_its_cause(page: str) -> None:
    with temporary_settings({PREFECT_API_URL: page}), get_client(sync_client=True) as client:
        with pytest.raises(RuntimeError) as raised:
            client.raise_for_api_version_mismatch()
        assert f"{page} answers GET /admin/version with text/html" in api_trouble(raised.value)


def test_an_address_of_an_api_that_knows_no_such_path_is_to_be_looked_at() -> None:
    request = httpx.Request("POST", "http://example/api/flows/filter")
    refused = httpx.HTTPStatusError("", request=request, response=httpx.Response(404, request=request))
    with temporary_settings({PREFECT_API_URL: "http://example/api"}):
        told = api_trouble(refused)
    assert "http://example/api answers 404 Not Found to POST /api/flows/filter" in told
    assert "PREFECT_API_URL=..." in told


def test_what_else_is_no_json_is_no_trouble_with_the_api() -> None:
    import json

    with pytest.raises(json.JSONDecodeError) as raised:
        json.loads("<html>")
    assert api_trouble(raised.value) == ""

"""The Runtime API that AWS's runtime client talks to: a server on the loopback interface for each sandbox."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, Protocol

SHUTDOWN_S = 1.0
"""How often a server looks whether it is to end; nobody waits for that."""


class Event(NamedTuple):
    """What a runtime is given to do.

    Attributes:
        request: Its request id.
        body: The event.
        deadline: When its time is over (Unix time).
        arn: The function that was asked for.
    """

    request: str
    body: bytes
    deadline: float
    arn: str


class Work(Protocol):
    """Where a runtime's work comes from and goes to."""

    def next_event(self) -> Event | None:
        """Wait for work; ``None`` where there will be none."""
        ...

    def ended(self, kind: str, payload: bytes) -> None:
        """A reply, or an error of some kind."""
        ...


class RuntimeApi:
    """Serves one sandbox.

    Args:
        work: What it asks and tells.
    """

    def __init__(self, work: Work) -> None:
        self._server = _Server(("127.0.0.1", 0), _Answers)
        self._server.work = work
        threading.Thread(target=self._server.serve_forever, args=(SHUTDOWN_S,), daemon=True).start()

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """End it; takes a moment."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    work: Work

    def handle_error(self, request: object, client_address: object) -> None:
        """A runtime that is killed breaks its connections: nothing to tell."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        event = self.server.work.next_event()
        if event is None:
            self.close_connection = True
            return
        headers = {
            "Lambda-Runtime-Aws-Request-Id": event.request,
            "Lambda-Runtime-Deadline-Ms": str(int(1000 * event.deadline)),
            "Lambda-Runtime-Invoked-Function-Arn": event.arn,
            "Content-Type": "application/json",
        }
        with contextlib.suppress(OSError):  # killed while it waited
            self._reply(200, event.body, headers)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = ""
        if self.path.endswith("/error"):
            with contextlib.suppress(ValueError):
                kind = str(json.loads(body).get("errorType", ""))
            kind = kind or self.headers.get("Lambda-Runtime-Function-Error-Type", "Unhandled")
        self._reply(202, b'{"status":"OK"}', {})
        self.server.work.ended(kind, body)

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

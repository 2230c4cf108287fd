"""A Docker engine on loopback: the part of its HTTP API that Prefect's Docker worker uses, with GPUs as a real one.

Containers are processes of this machine that run the command they were created with; the devices that a container
would see are in ``NVIDIA_VISIBLE_DEVICES`` of its process, as NVIDIA's runtime has it. Bodies are checked and answered
in the form of Docker Engine API 1.43.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import parse_qs, urlsplit

VERSION = "1.43"


@dataclass
class Container:
    """One container: what it was created with, and its process."""

    id: str
    name: str
    body: dict[str, Any]
    devices: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    output: bytes = b""
    exit_code: int = 0

    @property
    def status(self) -> str:
        if self.process is None:
            return "created"
        return "running" if self.process.poll() is None else "exited"

    def document(self) -> dict[str, Any]:
        state = {"Status": self.status, "Running": self.status == "running", "ExitCode": self.exit_code}
        config = {"Image": self.body["Image"], "Labels": self.body.get("Labels") or {}, "Tty": False}
        return {"Id": self.id, "Name": f"/{self.name}", "State": state, "Config": config, "Image": "sha256:0"}


@dataclass
class DockerEngine:
    """What the server has.

    Attributes:
        gpus: UUIDs of its GPUs; none means that NVIDIA's container toolkit isn't installed either.
        containers: By id, in order of creation.
    """

    gpus: tuple[str, ...] = ()
    containers: dict[str, Container] = field(default_factory=dict)
    url: str = ""
    _ids: count[int] = field(default_factory=lambda: count(1))

    def create(self, name: str, body: dict[str, Any]) -> Container:
        id_ = f"{next(self._ids):064x}"
        container = self.containers[id_] = Container(id_, name or id_[:12], body)
        return container

    def start(self, container: Container) -> str:
        """Start it; what the engine says where it can't."""
        for request in container.body.get("HostConfig", {}).get("DeviceRequests") or []:
            if not self.gpus:
                wanted = request["Capabilities"]
                return f'could not select device driver "{request["Driver"]}" with capabilities: {wanted}'
            ids, number = request.get("DeviceIDs") or [], request.get("Count") or 0
            if ids and number:
                return "cannot set both Count and DeviceIDs on device request"
            known = {str(k): uuid for k, uuid in enumerate(self.gpus)} | {uuid: uuid for uuid in self.gpus}
            if any(name not in known for name in ids):
                return f"nvidia-container-cli: device error: {ids}: unknown device"
            if number > len(self.gpus):
                return f"nvidia-container-cli: device error: {number - 1}: unknown device"
            container.devices = [known[name] for name in ids] or list(
                self.gpus[: len(self.gpus) if number < 0 else number]
            )
        env = dict(entry.partition("=")[::2] for entry in container.body.get("Env") or [])
        container.process = subprocess.Popen(
            container.body["Cmd"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={"PATH": os.environ["PATH"], **env, "NVIDIA_VISIBLE_DEVICES": ",".join(container.devices) or "void"},
        )  # fmt: skip
        return ""

    def wait(self, container: Container) -> int:
        assert container.process is not None
        if not container.output:
            container.output = container.process.communicate(timeout=60)[0]
        container.exit_code = container.process.wait(60)
        return container.exit_code


@contextmanager
def serving(engine: DockerEngine) -> Iterator[DockerEngine]:
    """Serve an engine on loopback; its ``url`` is what ``DOCKER_HOST`` takes."""

    class Handler(_Handler):
        docker = engine

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    engine.url = f"tcp://127.0.0.1:{server.server_address[1]}"
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        for container in engine.containers.values():
            if container.process is not None and container.process.poll() is None:
                container.process.kill()
                container.process.wait()


class _Handler(BaseHTTPRequestHandler):
    docker: DockerEngine

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_DELETE(self) -> None:
        self._route("DELETE")

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def _route(self, method: str) -> None:
        url = urlsplit(self.path)
        parts = [part for part in url.path.split("/") if part]
        if parts and parts[0].startswith("v1."):
            parts = parts[1:]
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or "{}") if length else {}
        match method, parts:
            case "GET", ["_ping"]:
                self._answer(200, b"OK")
            case "GET", ["version"]:
                self._answer(200, {"Version": "24.0.7", "ApiVersion": VERSION, "MinAPIVersion": "1.24"})
            case "GET", ["info"]:
                runtimes = {
                    "runc": {},
                    **({"nvidia": {"path": "nvidia-container-runtime"}} if self.docker.gpus else {}),
                }
                self._answer(200, {"ServerVersion": "24.0.7", "Runtimes": runtimes, "DefaultRuntime": "runc"})
            case "GET", ["images", *_, "json"]:
                self._answer(200, {"Id": "sha256:0", "RepoTags": ["job:latest"]})
            case "POST", ["containers", "create"]:
                if not isinstance(body.get("Image"), str):
                    self._answer(400, {"message": "no image"})
                else:
                    made = self.docker.create(query.get("name", ""), body)
                    self._answer(201, {"Id": made.id, "Warnings": []})
            case _, ["containers", id_, *rest] if id_ in self.docker.containers:
                self._container(method, self.docker.containers[id_], rest)
            case _:
                self._answer(404, {"message": f"no such thing: {method} {url.path}"})

    def _container(self, method: str, container: Container, rest: list[str]) -> None:
        match method, rest:
            case "GET", ["json"]:
                self._answer(200, container.document())
            case "POST", ["start"]:
                why = self.docker.start(container)
                self._answer(500, {"message": why}) if why else self._answer(204, b"")
            case "POST", ["wait"]:
                self._answer(200, {"StatusCode": self.docker.wait(container)})
            case "GET", ["logs"]:
                self.docker.wait(container)
                frame = b"\x01\x00\x00\x00" + len(container.output).to_bytes(4, "big") + container.output
                self._answer(200, frame)
            case "DELETE", []:
                self._answer(204, b"")
            case _:
                self._answer(404, {"message": f"no such thing: {method} {rest}"})

    def _answer(self, status: int, content: Any) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Api-Version", VERSION)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

"""What GPUs the containers of a Docker engine may have, as the engine itself says.

A container is given devices by a *device request*. Two of its traits matter: a request by ``Count`` is given the first
so many devices, whoever has them already, so that containers side by side share device 0; and an engine without
NVIDIA's container toolkit creates the container and refuses to start it. The devices themselves no engine lists, except
those that are declared by CDI.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from prefect_slo.errors import InvalidValue, SloError
from prefect_slo.runner.local.probe import Probe

DEFAULT_HOST = "unix:///var/run/docker.sock"
_TIMEOUT_S = 10.0
_KEEP_S = 60.0


@dataclass(frozen=True)
class Engine:
    """A Docker engine, as far as GPUs go.

    Attributes:
        version: Its version.
        nvidia: Whether NVIDIA's runtime or CDI devices of it are there.
        devices: Names of devices that are declared by CDI, e.g. ``nvidia.com/gpu=0``; others can't be listed.
    """

    version: str
    nvidia: bool
    devices: tuple[str, ...] = ()


def probe(host: str | None = None) -> Engine:
    """Ask an engine what it has.

    Args:
        host: ``unix:///path`` or ``tcp://host:port``; by default ``DOCKER_HOST``, or the usual socket.

    Raises:
        InvalidValue: A host of another form.
        SloError: No engine answers there.
    """
    host = host or os.environ.get("DOCKER_HOST") or DEFAULT_HOST
    connection = _connection(host)
    try:
        connection.request("GET", "/info")
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise SloError(f"the Docker engine at {host} answered with {response.status}: {body[:200]!r}.")
        info: dict[str, Any] = json.loads(body)
    except (OSError, HTTPException, ValueError) as error:
        raise SloError(
            f"no Docker engine answers at {host} ({error}). Start it, or say where it is: DOCKER_HOST=tcp://host:port."
        ) from None
    finally:
        connection.close()
    cdi = [str(each.get("ID", "")) for each in info.get("DiscoveredDevices") or () if each.get("Source") == "cdi"]
    devices = tuple(name for name in cdi if name.startswith("nvidia.com/"))
    return Engine(
        str(info.get("ServerVersion", "")), "nvidia" in (info.get("Runtimes") or {}) or bool(devices), devices
    )


def lack(host: str) -> str:
    """Why containers of an engine can have no GPU, in words; empty where they may. What it says holds for a while."""
    with _lock:
        if host not in _asked:
            unheard = f"the Docker engine at {host} does not answer"
            _asked[host] = Probe(
                f"The Docker engine at {host}", lambda: _lack(host), unheard, "it is taken to have no GPU",
                timeout_s=2 * _TIMEOUT_S, keep_s=_KEEP_S,
            )  # fmt: skip
    return _asked[host].get()


def _lack(host: str) -> str:
    try:
        engine = probe(host)
    except SloError as error:
        return str(error).rstrip(".")
    return "" if engine.nvidia else f"the Docker engine at {host} is without NVIDIA's container toolkit"


def devices_of(names: Sequence[str]) -> dict[str, Any]:
    """Job variables of a Docker work pool whose containers have these devices, by index or UUID, and no others.

    What ``WorkPool(job_variables=...)`` takes: one pool for each device, as the engine does not see to it that
    containers side by side have different ones.

    Raises:
        InvalidValue: No names.
    """
    if not names or isinstance(names, str):
        raise InvalidValue("devices", names, "a list of indices or UUIDs, such as ['0']")
    request = {"Driver": "nvidia", "DeviceIDs": [str(name) for name in names], "Capabilities": [["gpu"]]}
    return {"container_create_kwargs": {"device_requests": [request]}}


_lock = threading.Lock()
_asked: dict[str, Probe[str]] = {}


def _forget_after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _asked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


class _UnixConnection(HTTPConnection):
    """HTTP over a socket of this machine."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(host: str) -> HTTPConnection:
    place, port = address_of(host)
    return HTTPConnection(place, port, timeout=_TIMEOUT_S) if port else _UnixConnection(place)


def address_of(host: str) -> tuple[str, int]:
    """Name and port of an engine; path and 0 of one on this machine.

    Raises:
        InvalidValue: A host of another form.
    """
    address = urlsplit(str(host))
    if address.scheme == "unix" and address.path:
        return address.path, 0
    if address.scheme in ("tcp", "http") and address.hostname:
        return address.hostname, address.port or 2375
    raise InvalidValue("docker host", host, "unix:///path or tcp://host:port")

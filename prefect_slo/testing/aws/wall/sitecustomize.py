"""The wall of every process under test: Python imports this as it starts, where its folder is on the path.

It is imported by processes that see nothing else of this package, and imports botocore only as they do.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

SESSIONS = {"botocore.httpsession": "URLLib3Session", "aiobotocore.httpsession": "AIOHTTPSession"}
"""Where requests to AWS leave a process, synchronously and asynchronously."""


class RealAwsCall(BaseException):
    """A request that would have left this machine. Not an ``Exception``: no retry may swallow it."""


def refuse(request: Any) -> None:
    """Let a request pass that stays on this machine.

    Raises:
        RealAwsCall: It would not.
    """
    from urllib.parse import urlsplit

    host = urlsplit(request.url).hostname or ""
    if host not in ("localhost", "::1") and not host.startswith("127."):
        raise RealAwsCall(f"blocked {request.method} {request.url}: it would have left this machine")


def walled(send: Any) -> Any:
    """A session's ``send``, of either kind, behind the wall."""

    def refusing(self: Any, request: Any) -> Any:
        refuse(request)
        return send(self, request)

    return refusing


class _Builder:
    """Finds the modules of sessions, and puts up the wall as they are imported."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in SESSIONS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            session = getattr(module, SESSIONS[name])
            session.send = walled(session.send)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _Builder)

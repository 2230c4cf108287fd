"""What went wrong with Prefect's API, in words that say what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from json import JSONDecodeError
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

THEN = {
    401: "Set PREFECT_API_KEY or PREFECT_API_AUTH_STRING, or log in (prefect cloud login).",
    403: "Ask for the permission, or take another workspace (prefect cloud workspace set).",
    429: "Wait a minute: it has been asked too often.",
}
UNSTARTED = "ephemeral Prefect API server"
"""What Prefect calls the temporary server that it starts where no address is set, in what it raises."""

SERVER = "Look at the server's log, and whether its version is that of this client (prefect version)."

NO_PATH = (404, 405)
"""What a server answers that knows nothing of the path it was asked for: it is not Prefect's, or asked at its root."""


def api_trouble(error: Exception) -> str:
    """What kept a command from the API, in words; empty where an error is of another kind.

    An answer that says that the request was wrong is of another kind: what is wrong then is who asked. One that says
    that there is nothing of the kind at this address, or that is no answer of Prefect's, speaks of the address.

    Args:
        error: What was raised.
    """
    if "httpx" not in sys.modules:  # nobody has asked the API
        return ""
    import httpx
    from prefect.settings import get_current_settings

    address = get_current_settings().api.url or "of a temporary server"
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        answers = f"{status} {error.response.reason_phrase}"
        if status in NO_PATH:
            asked = error.request
            return _elsewhere(address, f"answers {answers} to {asked.method} {asked.url.path}")
        then = THEN.get(status, SERVER if status >= 500 else "")
        return f"Prefect's API {address} answers {answers}. {then}" if then else ""
    if isinstance(error, JSONDecodeError) and (page := _page(error.__traceback__)) is not None:
        kind = page.headers.get("content-type", "").partition(";")[0] or "text without a type"
        return _elsewhere(address, f"answers {page.request.method} {page.url.path} with {kind}")
    if isinstance(error, httpx.TransportError):
        why = str(error) or type(error).__name__
        return (
            f"Prefect's API {address} cannot be reached ({why}). Start a server (prefect server start), or say "
            "where it is: prefect config set PREFECT_API_URL=..."
        )
    if isinstance(error, RuntimeError) and UNSTARTED in str(error):
        return (
            "Prefect's temporary server has not started in time. Start one that stays (prefect server start) and say "
            "where it is: prefect config set PREFECT_API_URL=... Or give it longer: "
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS=60"
        )
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # as a run's client says it
        return api_trouble(error.__cause__)
    return ""


def _elsewhere(address: str, answers: str) -> str:
    """That an address is hardly that of Prefect's API, by its answer, and what to set in its place."""
    root = address.rstrip("/")
    if root.endswith("/api") or "/api/" in root:
        then = (
            "Look whether a Prefect server is there, of this client's version (prefect version); else say where it is: "
            "prefect config set PREFECT_API_URL=..."
        )
    else:
        then = f"The API of a Prefect server is at /api: prefect config set PREFECT_API_URL={root}/api"
    return f"{address} {answers}, as Prefect's API does not. {then}"


def _page(traceback: TracebackType | None) -> httpx.Response | None:
    """The answer of which somebody has made no JSON, where that is why."""
    import httpx

    found = (frame.get("self") for frame in _frames(traceback))
    return next((answer for answer in found if isinstance(answer, httpx.Response)), None)


def _frames(traceback: TracebackType | None) -> Iterator[dict[str, object]]:
    """Locals of what was under way when something was raised, outermost first."""
    while traceback is not None:
        yield traceback.tb_frame.f_locals
        traceback = traceback.tb_next

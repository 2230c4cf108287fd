"""What went wrong with Prefect's API, in words that say what to do."""

from __future__ import annotations

import sys

THEN = {
    401: "Set PREFECT_API_KEY or PREFECT_API_AUTH_STRING, or log in (prefect cloud login).",
    403: "Ask for the permission, or take another workspace (prefect cloud workspace set).",
    429: "Wait a minute: it has been asked too often.",
}
UNSTARTED = "ephemeral Prefect API server"
"""What Prefect calls the temporary server that it starts where no address is set, in what it raises."""

SERVER = "Look at the server's log, and whether its version is that of this client (prefect version)."


def api_trouble(error: Exception) -> str:
    """What kept a command from the API, in words; empty where an error is of another kind.

    An answer that says that the request was wrong is of another kind: what is wrong then is who asked.

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
        then = THEN.get(status, SERVER if status >= 500 else "")
        if not then:
            return ""
        return f"Prefect's API {address} answers {status} {error.response.reason_phrase}. {then}"
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
    return ""

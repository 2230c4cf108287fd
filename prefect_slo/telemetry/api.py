"""Clients of Prefect's API for what the package does itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from httpx import Response, codes
from prefect.client.orchestration import get_client
from prefect.context import SyncClientContext
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

SHORTEST_S, LONGEST_S, AS_LONG_AS_S = 0.1, 1.0, 10.0
"""A request that a busy server has refused: the shortest and the longest wait at first, and for how long that is."""


def api_client(*, own: bool = False) -> SyncPrefectClient:
    """A client as Prefect makes it, which comes back soon where the server was busy for a moment.

    On SQLite a server refuses to write (503) for whoever has read before somebody else wrote, however short that took,
    and Prefect's client waits for 2 s then, and for 4, 8, ... Here short waits, and tries, come before those.

    Args:
        own: Whether to make one within a flow run, too, whose own client serves otherwise: that one is open already,
            which takes longer than a request, and waits as Prefect's do.
    """
    if not own and SyncClientContext.get() is not None:
        return get_client(sync_client=True)
    return get_client(httpx_settings={"event_hooks": {"response": [soon_again]}}, sync_client=True)


def soon_again(response: Response) -> None:
    """Have Prefect's client make a refused request again soon, unless the server says when or it is to try once."""
    if response.status_code != codes.SERVICE_UNAVAILABLE or not PREFECT_CLIENT_MAX_RETRIES.value():
        return
    waited_s = response.request.extensions.get("slo_waited_s", 0.0)
    if waited_s < AS_LONG_AS_S and "Retry-After" not in response.headers:
        wait_s = min(max(waited_s, SHORTEST_S), LONGEST_S)
        response.request.extensions["slo_waited_s"] = waited_s + wait_s
        response.headers["Retry-After"] = f"{wait_s:g}"
        response.headers["Prefect-Maintenance"] = "true"  # what Prefect's client doesn't count as one of its tries

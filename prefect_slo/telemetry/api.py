"""Clients of Prefect's API for what the package does itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from httpx import Response, codes
from prefect.client.orchestration import get_client
from prefect.context import SyncClientContext
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

AGAIN_S, LATER = 0.1, 4
"""Seconds until a request that a busy server has refused is made again, and how many times as long the next wait is."""


def api_client(*, own: bool = False) -> SyncPrefectClient:
    """A client as Prefect makes it, which comes back soon where the server was busy for a moment.

    On SQLite a server refuses to write (503) for whoever has read before somebody else wrote, however short that took,
    and Prefect's client waits for 2 s then, and for 4, 8, ... Here the first waits are short, and grow faster.

    Args:
        own: Whether to make one within a flow run, too, whose own client serves otherwise: that one is open already,
            which takes longer than a request, and waits as Prefect's do.
    """
    if not own and SyncClientContext.get() is not None:
        return get_client(sync_client=True)
    return get_client(httpx_settings={"event_hooks": {"response": [soon_again]}}, sync_client=True)


def soon_again(response: Response) -> None:
    """Have Prefect's client make a refused request again soon, unless the server says when, or it does so but once."""
    if response.status_code != codes.SERVICE_UNAVAILABLE or PREFECT_CLIENT_MAX_RETRIES.value() < 2:
        return
    if "Retry-After" not in response.headers:
        seen = response.request.extensions
        seen["slo_wait_s"] = seen.get("slo_wait_s", AGAIN_S / LATER) * LATER
        response.headers["Retry-After"] = f"{seen['slo_wait_s']:g}"

"""One writer at a time: a Prefect global concurrency limit of one, held while a profile is changed."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from prefect_slo.telemetry.store import slug

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

LEASE_S = 60.0  # the least that the server grants; a holder that dies blocks others for so long
_here: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


@contextmanager
def profile_lease(flow_name: str, *, timeout_s: float, client: SyncPrefectClient | None = None) -> Iterator[None]:
    """Hold the right to change a flow's profile.

    Blocks have no version to compare, so a load-change-save without the lease loses concurrent changes.

    Args:
        flow_name: Name of the flow.
        timeout_s: How long to wait for another writer.
        client: Client to make the limit with; one is made when missing.

    Raises:
        TimeoutError: Another writer held it for longer.
        httpx.HTTPError: The API cannot be reached, or refuses.
    """
    name = f"slo-profile-{slug(flow_name)}"
    lock = _here[name]  # threads of this process wait here, not at the server, which lets a denied client wait long
    if not lock.acquire(timeout=timeout_s):
        raise TimeoutError(f"the profile of {flow_name!r} was being written for more than {timeout_s:g} s")
    try:
        _ensure_limit(name, client)
        with concurrency(name, occupy=1, strict=True, timeout_seconds=timeout_s, lease_duration=LEASE_S):
            yield
    finally:
        lock.release()


def _ensure_limit(name: str, client: SyncPrefectClient | None) -> None:
    with ExitStack() as stack:
        api = client or stack.enter_context(get_client(sync_client=True))
        try:
            api.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            try:
                api.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
            except ObjectAlreadyExists:
                return  # another process was quicker

"""One writer at a time: a Prefect global concurrency limit of one, held while a profile is changed.

Prefect's own ``concurrency`` acquires in a service that it starts for each limit, and none can be started any more once
an interpreter shuts down: what a process has left to learn at its end, as that of a deployed run always has, would
never be written. So the limit is asked for here, by plain calls.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING
from uuid import UUID

import httpx
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.logging import get_logger

from prefect_slo.telemetry.api import api_client
from prefect_slo.telemetry.store import slug

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

LEASE_S = 60.0  # the least that the server grants; a holder that dies blocks others for so long
ASK_S, LONGEST_S = 0.05, 1.0
"""Between two tries, twice as long each time: most writers hold it for a fraction of a second, and the process that
waits is often one that ends. The server would let a client that it denies wait for longer."""

_here: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


@contextmanager
def profile_lease(flow_name: str, *, timeout_s: float, client: SyncPrefectClient | None = None) -> Iterator[None]:
    """Hold the right to change a flow's profile.

    Blocks have no version to compare, so a load-change-save without the lease loses concurrent changes.

    Args:
        flow_name: Name of the flow.
        timeout_s: How long to wait for another writer.
        client: Client to ask with; one is made when missing.

    Raises:
        TimeoutError: Another writer held it for longer.
        httpx.HTTPError: The API cannot be reached, or refuses.
    """
    name, until = f"slo-profile-{slug(flow_name)}", time.monotonic() + timeout_s
    lock = _here[name]  # threads of this process wait here, not at the server
    if not lock.acquire(timeout=timeout_s):
        raise _too_long(flow_name, timeout_s)
    try:
        with ExitStack() as stack:
            api = client or stack.enter_context(api_client())
            _ensure_limit(name, api)
            pause_s = ASK_S
            while (lease := _granted(name, api)) is None:
                if time.monotonic() >= until:
                    raise _too_long(flow_name, timeout_s)
                time.sleep(min(pause_s, max(until - time.monotonic(), 0.0)))
                pause_s = min(2 * pause_s, LONGEST_S)
            with _renewed(lease, api):
                yield
    finally:
        lock.release()


def _granted(name: str, api: SyncPrefectClient) -> UUID | None:
    """A lease of the limit; ``None`` where somebody else holds it."""
    try:
        granted = api.increment_concurrency_slots_with_lease([name], 1, "concurrency", LEASE_S)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.LOCKED:
            return None
        raise
    return UUID(granted.json()["lease_id"])


@contextmanager
def _renewed(lease: UUID, api: SyncPrefectClient) -> Iterator[None]:
    """Renew a lease for as long as this is entered, and give it back."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(LEASE_S / 2):
            try:
                api.renew_concurrency_lease(lease, LEASE_S)
            except httpx.HTTPError:
                get_logger("slo").warning("The lease of a profile could not be renewed.", exc_info=True)

    threading.Thread(target=renew, name="prefect-slo-lease", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        api.release_concurrency_slots_with_lease(lease)


def _ensure_limit(name: str, api: SyncPrefectClient) -> None:
    try:
        api.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        try:
            api.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
        except ObjectAlreadyExists:
            return  # another process was quicker


def _too_long(flow_name: str, timeout_s: float) -> TimeoutError:
    return TimeoutError(f"the profile of {flow_name!r} was being written for more than {timeout_s:g} s")

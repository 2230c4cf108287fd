"""What bundles leave on a Ray cluster while they run: since when, for the case that nothing else is heard of them.

A bundle that is cancelled, or whose worker dies, sends no reply; what it has cost depends on whether it had its turn.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

_NAMESPACE = b"prefect_slo"


def mark(token: str) -> Callable[[], None]:
    """On a worker: the bundle has its turn. Returns what drops the mark; each is done beside it, by a round trip."""
    since = repr(time.time()).encode()

    def make() -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        with suppress(Exception):  # without a mark it costs less than it should: that ends no bundle
            _internal_kv_put(token, since, namespace=_NAMESPACE)

    def remove() -> None:
        from ray.experimental.internal_kv import _internal_kv_del

        making.join()
        with suppress(Exception):
            _internal_kv_del(token, namespace=_NAMESPACE)

    (making := _beside(make)).start()
    return _beside(remove).start


def _beside(do: Callable[[], None]) -> threading.Thread:
    return threading.Thread(target=do, name="prefect-slo-mark", daemon=True)


def turns(token: str) -> list[float]:
    """When a bundle that runs, or was lost, had its turn, in seconds since the epoch; empty where it left no mark."""
    from ray.experimental.internal_kv import _internal_kv_get

    found = _internal_kv_get(token, namespace=_NAMESPACE)
    return [float(found)] if found else []


def forget(run_key: str) -> None:
    """Drop what bundles of a run have left that were lost."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(f"prefect-slo-{run_key}", del_by_prefix=True, namespace=_NAMESPACE)

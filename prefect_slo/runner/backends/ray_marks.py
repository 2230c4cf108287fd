"""What bundles leave on a Ray cluster while they run: since when, for the case that nothing else is heard of them.

A bundle that is cancelled, or whose worker dies, sends no reply; what it has cost depends on whether it had its turn.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_NAMESPACE = b"prefect_slo"


@contextmanager
def marked(token: str) -> Iterator[None]:
    """On a worker: the bundle runs. The mark is made and dropped beside it, which takes a round trip each."""
    mark, over = repr(time.time()).encode(), threading.Event()

    def hold() -> None:
        from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

        with suppress(Exception):  # without a mark it costs less than it should: that ends no bundle
            _internal_kv_put(token, mark, namespace=_NAMESPACE)
            over.wait()
            _internal_kv_del(token, namespace=_NAMESPACE)

    threading.Thread(target=hold, name="prefect-slo-mark", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def turns(token: str) -> list[float]:
    """When a bundle that runs, or was lost, had its turn, in seconds since the epoch; empty where it left no mark."""
    from ray.experimental.internal_kv import _internal_kv_get

    found = _internal_kv_get(token, namespace=_NAMESPACE)
    return [float(found)] if found else []


def forget(run_key: str) -> None:
    """Drop what bundles of a run have left that were lost."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(f"prefect-slo-{run_key}", del_by_prefix=True, namespace=_NAMESPACE)

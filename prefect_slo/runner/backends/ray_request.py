"""What Ray's autoscaler is asked for ahead of need.

A cluster holds one request, and whoever makes another replaces it. So that of this process is one for all of its flow
runs; and where somebody else has made one, that is left alone: nodes then come when bundles queue, as ever.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

Shape = Mapping[str, float]
"""What a worker takes, by resource."""


class Request:
    """This process' request, added up over its flow runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cluster = ""
        self._of: dict[object, Sequence[Shape]] = {}
        self._made: Counter[str] = Counter()
        self._said: set[str] = set()

    def make(self, run: object, shapes: Sequence[Shape]) -> None:
        """Ask for what a flow run needs in place of what it needed before. Never raises: it is a hint."""
        with self._lock:
            if not shapes and run not in self._of:
                return
            try:
                self._at(_cluster())
                self._of[run] = shapes
                self._ask([dict(shape) for each in self._of.values() for shape in each])
            except Exception as error:
                self._say(f"Ray's autoscaler can't be told ahead of need ({type(error).__name__}: {error}).")
            if not shapes:
                self._of.pop(run, None)

    def _at(self, cluster: str) -> None:
        """What was asked of another cluster is over."""
        if cluster != self._cluster:
            self._cluster, self._of, self._made = cluster, {}, Counter()

    def _ask(self, shapes: list[dict[str, float]]) -> None:
        from ray.autoscaler.sdk import request_resources

        wanted, found = _counted(shapes), _counted(requested())
        if found and found != self._made:
            self._say("Somebody else has asked Ray's autoscaler for nodes: what a plan needs is not added to that.")
        elif found != wanted:
            request_resources(bundles=shapes)
            self._made = wanted

    def _say(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            logger.warning(words)


def requested() -> list[dict[str, float]]:
    """What the autoscaler of the cluster is asked for, by Ray's own record."""
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get, internal_kv_get_gcs_client

    if not is_autoscaler_v2():
        written = _internal_kv_get(b"autoscaler_resource_request")
        return list(json.loads(written)) if written else []
    state: Any = get_cluster_resource_state(internal_kv_get_gcs_client())
    return [
        dict(entry.request.resources_bundle)
        for constraint in state.cluster_resource_constraints
        for entry in constraint.resource_requests
        for _ in range(entry.count)
    ]


def _cluster() -> str:
    """Names the cluster that this process is connected to."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _counted(shapes: Iterable[Shape]) -> Counter[str]:
    return Counter(json.dumps(dict(shape), sort_keys=True) for shape in shapes)


REQUEST = Request()
"""Of this process."""

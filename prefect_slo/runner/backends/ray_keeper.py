"""What Ray's autoscaler is asked for ahead of need, kept on the cluster for as long as those who ask are alive.

A cluster holds one request, until somebody makes another. So one actor makes it for all processes that ask: it adds up
what they need, looks whether they are alive, and withdraws what those that are not had asked for. Where somebody else
has made a request, that is left alone: nodes then come when bundles queue, as ever.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

WATCH_S = 2.0
"""How often it looks: a machine is kept this much longer than its process."""

_NAME, _NAMESPACE = "autoscaler request", "prefect_slo"
_BOOK = b"autoscaler_request"

Shape = Mapping[str, float]
"""What a worker takes, by resource."""


class Keeper:
    """The actor. It ends when nobody asks for anything.

    What it keeps is written down on the cluster beforehand: one that was killed is started again by Ray, and goes on.
    """

    def __init__(self) -> None:
        import ray

        self._actor = ray.get_runtime_context().current_actor
        self._lock = threading.Lock()
        self._of, self._made = _read()
        threading.Thread(target=self._watch, daemon=True).start()

    def ask(self, job: str, shapes: Sequence[Shape]) -> str:
        """Ask for what a process needs in place of what it needed before; in words, why that could not be.

        Args:
            job: The process, by Ray's id.
            shapes: What its workers take.
        """
        with self._lock:
            asked = {other: theirs for other, theirs in self._of.items() if other != job}
            return self._settle({**asked, job: list(shapes)} if shapes else asked)

    def _watch(self) -> None:
        import ray

        while True:
            time.sleep(WATCH_S)
            with self._lock:
                try:
                    self._settle({job: shapes for job, shapes in self._of.items() if _lives(job)})
                    if not self._of:
                        ray.kill(self._actor)
                except Exception:
                    logger.warning("Ray's autoscaler can't be told what nobody needs any more.", exc_info=True)

    def _settle(self, asked: dict[str, list[Shape]]) -> str:
        """Make the request the sum of what is asked, unless it is somebody else's."""
        from ray.autoscaler.sdk import request_resources

        wanted, found = [dict(shape) for shapes in asked.values() for shape in shapes], requested()
        others = bool(found) and not any(_counted(found) == _counted(made) for made in self._made)
        made: list[list[Shape]] = self._made if others else [[*found], [*wanted]]  # either is there if this ends now
        if (asked, made) != (self._of, self._made):
            _write(asked, made)
            self._of, self._made = asked, made
        if others:
            return "Somebody else has asked Ray's autoscaler for nodes: what a plan needs is not added to that."
        if _counted(found) != _counted(wanted):
            request_resources(bundles=wanted)
        return ""


def keeper() -> Any:
    """The actor of the cluster that this process is connected to; started where there is none."""
    import ray

    return (
        ray.remote(Keeper)
        .options(
            name=_NAME,
            namespace=_NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=-1,
            num_cpus=0,
            resources={"node:__internal_head__": 0.001},  # on a node that is never given back
        )
        .remote()
    )


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


def _lives(job: str) -> bool:
    """Whether a process is connected to the cluster, by Ray's table of jobs, which is told at once of one that dies."""
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    gcs: Any = internal_kv_get_gcs_client()
    found = gcs.get_all_job_info(
        job_or_submission_id=job, skip_submission_job_info_field=True, skip_is_running_tasks_field=True, timeout=10
    )
    return any(not info.is_dead for info in found.values())


def _read() -> tuple[dict[str, list[Shape]], list[list[Shape]]]:
    from ray.experimental.internal_kv import _internal_kv_get

    written = _internal_kv_get(_BOOK, namespace=_NAMESPACE)
    of, made = json.loads(written) if written else ({}, [])
    return of, made


def _write(of: Mapping[str, Sequence[Shape]], made: Sequence[Sequence[Shape]]) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_BOOK, json.dumps([of, made]).encode(), namespace=_NAMESPACE)


def _counted(shapes: Iterable[Shape]) -> Counter[tuple[tuple[str, float], ...]]:
    return Counter(tuple(sorted(shape.items())) for shape in shapes)

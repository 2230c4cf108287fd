"""A Ray cluster, as ``ClusterBackend`` uses it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from prefect_slo.control.need import Need
from prefect_slo.resources import Size
from prefect_slo.runner.backends.cluster_client import Fetch
from prefect_slo.runner.backends.protocol import Finished
from prefect_slo.runner.backends.ray_autoscaler import autoscales
from prefect_slo.runner.backends.ray_marks import forget, mark, turns
from prefect_slo.runner.backends.ray_request import REQUEST
from prefect_slo.runner.backends.remote import Reply, Work, leave, needed, placed, run_here
from prefect_slo.runner.notices import Notice, once

logger = logging.getLogger(__name__)

MOST_KEPT = 64
"""Parts of one bundle's outcomes that can stay on the cluster: Ray wants to know beforehand how many there may be."""

_GONE = "the Ray node that kept it is gone"


class RayCluster:
    """Bundles as Ray tasks: with ``num_cpus``, ``num_gpus`` and ``memory`` of their size, and never retried by Ray.

    Args:
        make: Connects this process, and says how to disconnect it.
        resources: By quantity of a size (``vcpus``, ``memory_mb``, ``gpu``), a custom resource that it takes of too.
        memory: Whether a bundle takes of Ray's ``memory``.
        own: Whether ``make`` starts the cluster.
        notice: Tells the user something.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[], None]],
        resources: Mapping[str, str],
        *,
        memory: bool = True,
        own: bool = False,
        notice: Notice = logger.warning,
    ) -> None:
        self._make, self._resources, self._memory = make, resources, memory
        self.own, self._notice = own, once(notice)
        self._disconnect: Callable[[], None] = lambda: None
        self._run: Any = None
        self._run_on_gpu: Any = None
        self._lost: set[str] = set()
        self._hoped_for: set[Size] = set()

    def connect(self) -> None:
        """Connect this process to Ray."""
        import ray

        self._disconnect = self._make()
        self._run = ray.remote(run_apart)
        # a process that has used a GPU holds on to it: such a one serves one bundle
        self._run_on_gpu = ray.remote(max_calls=1)(run_apart)

    def lack(self, size: Size) -> str:
        """What no node has of the resources that a size takes; an autoscaler that may bring one is waited for."""
        needs = self._takes(size)
        nodes = _workers().values()
        if not nodes or any(all(node.get(n, 0) >= v for n, v in needs.items()) for node in nodes):
            return ""
        most = {name: max(node.get(name, 0) for node in nodes) for name in needs}
        words = f"no Ray node has {', '.join(f'{n}={v:g} (the most: {most[n]:g})' for n, v in needs.items())}"
        with suppress(Exception):  # of an autoscaler that nothing can be heard of nothing can be hoped for either
            if autoscales():
                if size not in self._hoped_for:  # what other nodes have, who come meanwhile, is no news
                    self._hoped_for.add(size)
                    then = "Bundles wait for the cluster's autoscaler to bring one; `ray status` says whether it can"
                    self._notice(f"{words[0].upper()}{words[1:]}. {then}.")
                return ""
        return words

    def vacant(self) -> str:
        """Whether no node is alive, but for a head that runs nothing."""
        if _workers():
            return ""
        return (
            "The Ray cluster has no node with a CPU or a GPU yet. `ray status` says whether its autoscaler is starting "
            "one; else start one: ray start --address=<that of its head>"
        )

    def workers(self) -> frozenset[str]:
        """Ids of its nodes."""
        return frozenset(_workers())

    def expect(self, need: Need) -> None:
        """Ask Ray's autoscaler for nodes that hold these workers, unless somebody else has asked it for something."""
        most = Counter[Size]()
        for size, workers in need.next:  # they need not run side by side
            most |= Counter({size: workers})
        now = Counter[Size]()
        for size, workers in need.now:
            now[size] += workers
        REQUEST.make(self, [self._takes(size) for size in (now | most).elements()], self._notice)

    def start(self, work: Work, parts: Sequence[Any], done: Callable[[Fetch], None]) -> Any:
        """Call the remote function, with its parts as arguments: Ray places it where they lie, if it can."""
        size = work.size
        most = min(len(work.bundle.items), MOST_KEPT) if work.bundle.keep is not None else 0
        handle, *kept = (
            (self._run_on_gpu if size.gpu else self._run)
            .options(
                name=work.token,
                num_cpus=size.vcpus,
                num_gpus=size.gpu or None,
                memory=size.memory_mb * 2**20 if self._memory else None,
                resources=needed(size, self._resources) or None,
                max_retries=0,
                num_returns=1 + max(most, 1),  # of one alone Ray would not make a list
            )
            .remote(work, most, *parts)
        )

        def over(future: Any) -> None:
            def fetch() -> Reply | str:
                reply: Reply | str = future.result()
                return placed(reply, kept.__getitem__) if isinstance(reply, Reply) else reply

            done(fetch)

        handle.future().add_done_callback(over)
        return handle

    def fetch(self, part: Any) -> bytes:
        """Get the object: it is this process' own, and outlives the worker that made it, but not its node."""
        import ray

        try:
            found: bytes = ray.get(part)
        except ray.exceptions.ObjectLostError as error:
            self._lost.add(part.hex())
            raise LookupError(_GONE) from error
        return found

    def gone(self, part: Any) -> str:
        """What was heard of it: Ray says so only when an object is asked for."""
        return _GONE if part.hex() in self._lost else ""

    def never_ran(self, handle: Any, error: Exception | None) -> bool:
        """Whether Ray has failed it for an object that is lost."""
        import ray

        if not isinstance(error, ray.exceptions.ObjectLostError):
            return False
        self._lost.add(error.object_ref_hex)
        return True

    def turns(self, token: str) -> list[float]:
        """By its mark."""
        return turns(token)

    def end(self, handle: Any) -> Literal["told", "begun", "unbegun"]:
        """End its Ray worker, and with that the process that runs the bundle.

        Until that worker has died Ray may give it the next bundle, which would die with it.
        """
        import ray

        ray.cancel(handle, force=True)
        return "told"

    def close(self, run_key: str) -> None:
        """Take back what the autoscaler was asked for, and disconnect, where this run has connected."""
        try:
            REQUEST.make(self, [], self._notice)
            with suppress(Exception):
                forget(run_key)
        finally:
            self._disconnect()

    def _takes(self, size: Size) -> dict[str, float]:
        """What a worker of a size takes of a node."""
        wanted = {"CPU": size.vcpus, "memory": self._memory * size.memory_mb * 2.0**20, "GPU": size.gpu}
        return {**{name: value for name, value in wanted.items() if value}, **needed(size, self._resources)}


def run_apart(work: Work, most: int, *parts: bytes) -> list[Any]:
    """On a worker of the cluster: run a bundle; its reply, and each part that is left as an object of the caller's."""
    import ray

    drop_mark = mark(work.token)
    reply, left = run_here(work, parts), list[bytes]()
    if isinstance(reply, Reply):
        if isinstance(reply.reports[-1], Finished):
            drop_mark()  # else Ray, which ends a worker's processes before it, may let no reply follow
        reply = replace(reply, worker=ray.get_runtime_context().get_node_id())
        reply, left = leave(reply, work.bundle.keep, most)
    return [reply, *left, *[None] * (max(most, 1) - len(left))]


def _workers() -> dict[str, dict[str, float]]:
    """Resources of the nodes that are alive, by id. One without a CPU or a GPU, as heads often are, runs nothing."""
    import ray

    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return {id: has for id, has in nodes.items() if has.get("CPU") or has.get("GPU")}

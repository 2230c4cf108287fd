"""A Ray cluster, as ``ClusterBackend`` uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

from prefect_slo.resources import Size
from prefect_slo.runner.backends.cluster import Fetch
from prefect_slo.runner.backends.remote import Reply, Work, needed, run_here


class RayCluster:
    """Bundles as Ray tasks: with ``num_cpus``, ``num_gpus`` and ``memory`` of their size, and never retried by Ray.

    Args:
        make: Connects this process, and says how to disconnect it.
        resources: By quantity of a size (``vcpus``, ``memory_mb``, ``gpu``), a custom resource that it takes of too.
        memory: Whether a bundle takes of Ray's ``memory``.
    """

    def __init__(
        self, make: Callable[[], Callable[[], None]], resources: Mapping[str, str], *, memory: bool = True
    ) -> None:
        self._make, self._resources, self._memory = make, resources, memory
        self._disconnect: Callable[[], None] = lambda: None
        self._run: Any = None
        self._run_on_gpu: Any = None

    def connect(self) -> None:
        """Connect this process to Ray."""
        import ray

        self._disconnect = self._make()
        self._run = ray.remote(run_here)
        # a process that has used a GPU holds on to it: such a one serves one bundle
        self._run_on_gpu = ray.remote(max_calls=1)(run_here)

    def lack(self, size: Size) -> str:
        """What no node has of the resources that a size takes."""
        import ray

        wanted = {"CPU": size.vcpus, "memory": self._memory * size.memory_mb * 2.0**20, "GPU": size.gpu}
        needs = {**{n: v for n, v in wanted.items() if v}, **needed(size, self._resources)}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not nodes or any(all(node.get(n, 0) >= v for n, v in needs.items()) for node in nodes):
            return ""
        most = {name: max(node.get(name, 0) for node in nodes) for name in needs}
        return f"no Ray node has {', '.join(f'{n}={v:g} (the most: {most[n]:g})' for n, v in needs.items())}"

    def start(self, work: Work, done: Callable[[Fetch], None]) -> Any:
        """Call the remote function."""
        size = work.size
        handle = (
            (self._run_on_gpu if size.gpu else self._run)
            .options(
                name=work.token,
                num_cpus=size.vcpus,
                num_gpus=size.gpu or None,
                memory=size.memory_mb * 2**20 if self._memory else None,
                resources=needed(size, self._resources) or None,
                max_retries=0,
            )
            .remote(work)
        )

        def over(future: Any) -> None:
            def fetch() -> Reply | str:
                reply: Reply | str = future.result()
                return reply

            done(fetch)

        handle.future().add_done_callback(over)
        return handle

    def end(self, handle: Any) -> Literal["told", "begun", "unbegun"]:
        """End its Ray worker, and with that the process that runs the bundle."""
        import ray

        with suppress(Exception):
            ray.cancel(handle, force=True)
        return "begun"

    def close(self, run_key: str) -> None:
        """Disconnect, where this run has connected."""
        self._disconnect()

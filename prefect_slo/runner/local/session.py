"""What a pool has while it is awake: its threads, a nursery, descriptors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from prefect_slo.runner.local.cgroup import MemoryGroup
from prefect_slo.runner.local.keeping import PoolConfig
from prefect_slo.runner.local.launch import Forker
from prefect_slo.runner.local.line import Line
from prefect_slo.runner.local.memory import MemoryWatch
from prefect_slo.runner.local.nursery import Nursery


class Watched(Protocol):
    """Whose workers' memory is watched; see ``MemoryWatch``."""

    def busy(self) -> Iterable[tuple[int, int, float, MemoryGroup | None]]: ...

    def seen(self, token: int, used_mb: float) -> None: ...

    def exceeded(self, token: int, used_mb: float) -> None: ...


class Session:
    """From waking to rest.

    Args:
        config: Of the pool.
        watched: The pool.
        serve: What its I/O thread does until the pool rests; closes the session then.
        previous: The session before this one, which may not be over yet.
        zygote: One that is there already.
    """

    def __init__(
        self,
        config: PoolConfig,
        watched: Watched,
        serve: Callable[[Session], None],
        previous: Session | None,
        zygote: Forker | None = None,
    ) -> None:
        self.line = Line()
        self.nursery = Nursery(config.start, config.preload, self.line, zygote)
        self.watch = MemoryWatch(watched.busy, watched.seen, watched.exceeded)
        self.previous = previous
        self.thread = threading.Thread(target=serve, args=(self,), name="prefect-slo-io", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.watch.close()
        self.nursery.close()
        self.line.close()

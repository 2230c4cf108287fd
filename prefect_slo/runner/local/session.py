"""What a pool has while it is awake: its threads, a nursery, descriptors."""

from __future__ import annotations

import threading
from collections.abc import Callable

from prefect_slo.runner.local.crew import Crew
from prefect_slo.runner.local.keeping import PoolConfig
from prefect_slo.runner.local.launch import Forker
from prefect_slo.runner.local.line import Line
from prefect_slo.runner.local.memory import MemoryWatch
from prefect_slo.runner.local.nursery import Nursery


class Session:
    """From waking to rest.

    Args:
        config: Of the pool.
        crew: Its workers.
        serve: What its I/O thread does until the pool rests; closes the session then.
        previous: The session before this one, which may not be over yet.
        zygote: One that is there already.
    """

    def __init__(
        self,
        config: PoolConfig,
        crew: Crew,
        serve: Callable[[Session], None],
        previous: Session | None,
        zygote: Forker | None = None,
    ) -> None:
        self.line = Line()
        self.nursery = Nursery(config.start, config.preload, self.line, zygote)
        self.watch = MemoryWatch(crew.busy, crew.seen, crew.exceeded)
        self.previous = previous
        self.thread = threading.Thread(target=serve, args=(self,), name="prefect-slo-io", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.watch.close()
        self.nursery.close()
        self.line.close()

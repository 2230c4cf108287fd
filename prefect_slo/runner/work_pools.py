"""Prefect work pools as pools of a flow, for ``SLOTaskRunner(pools=[...])`` and ``@slo(pools=[...])``."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Mapping
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

from prefect_slo.errors import InvalidValue
from prefect_slo.pricing import price_list
from prefect_slo.resources import Capacity, Pool, Size
from prefect_slo.runner.backends.work_pool import WorkPoolBackend
from prefect_slo.runner.notices import warner
from prefect_slo.runner.pools import sizes_on, worker_counts
from prefect_slo.runner.workpool.docker_engine import address_of, lack
from prefect_slo.runner.workpool.jobs import Jobs
from prefect_slo.runner.workpool.office import Office, Terms
from prefect_slo.runner.workpool.sizing import Sizing, checked, job_variables
from prefect_slo.runner.workpool.stores import Store, store_of
from prefect_slo.units import finite, positive, text


@dataclass(frozen=True)
class WorkPool:
    """Workers in a Prefect work pool, of whatever type: process, Docker, Kubernetes, ECS, Cloud Run, …

    A job there, a *pilot*, runs a stage's items one bundle after another in a worker process of the stage's size, and
    stays warm for a while. Task runs belong to the flow run that sent them.

    Args:
        name: Name of the work pool, and what tasks, menus and plans call it.
        sizes: Sizes of workers. Those of ``hardware`` ``cpu``, which is this machine's name, take the pool's.
        storage: Where arguments and results travel: a folder that flow and jobs share, an address that fsspec opens,
            ``s3://bucket/prefix``, or a block. Who can write there can run code in the jobs.
        workers: Worker counts for menus; by default powers of four up to ``concurrency``.
        concurrency: Jobs that this process may have in the pool at once.
        hardware: Name that measurements are kept under; by default that of the pool.
        prices: Price list; by default the menu's.
        job_variables: Variables of every job, e.g. ``{"image": "..."}``.
        sizing: From a size to job variables; by default what fits the pool's type.
        overhead_mb: Memory that a job is given beyond its worker's.
        idle_s: How long a pilot stays warm once nobody needs it; ``0`` makes a job of every lease, ``None`` keeps it
            for as long as starting one was measured to take.
        lifetime_s: A pilot takes nothing new after this long.
        patience_s: How long a job may take to start before a warning says what the pool's trouble is.
        give_up_s: How long before the stage is told that it can't run there.
        heartbeat_s: Between two signs of life of flow and pilot; after six without, either takes the other for dead.
        queue: Work queue of the pool.
        docker_host: Docker engine of the pool's workers, ``unix:///path`` or ``tcp://host:port``: it is asked whether
            its containers may have GPUs. Where they may not, stages run on the CPU. Without, nobody is asked, and the
            log says so: the engine of this machine need not be that of the pool's workers.

    Raises:
        InvalidValue: A setting that can't be.
    """

    name: str
    sizes: tuple[Size, ...] = (Size(1, 1024),)
    storage: Any = None
    workers: tuple[int, ...] = ()
    concurrency: int = 16
    hardware: str | None = None
    prices: str | None = None
    job_variables: Mapping[str, Any] = field(default_factory=dict)
    sizing: Sizing | None = None
    overhead_mb: int = 256
    idle_s: float | None = None
    lifetime_s: float = 3600.0
    patience_s: float = 60.0
    give_up_s: float = 900.0
    heartbeat_s: float = 5.0
    queue: str | None = None
    docker_host: str | None = None

    def __post_init__(self) -> None:
        where = f"work pool {text(self.name, 'work_pool.name')}"
        hardware = text(self.hardware, f"{where}.hardware") if self.hardware is not None else self.name
        object.__setattr__(self, "sizes", sizes_on(hardware, self.sizes, where))
        object.__setattr__(self, "storage", store_of(self.storage))
        object.__setattr__(self, "workers", worker_counts(self.workers, self.concurrency, where))
        for name in ("lifetime_s", "patience_s", "give_up_s", "heartbeat_s"):
            positive(getattr(self, name), f"{where}.{name}")
        for name in ("idle_s", "overhead_mb"):
            if getattr(self, name) is not None and finite(getattr(self, name), f"{where}.{name}") < 0:
                raise InvalidValue(f"{where}.{name}", getattr(self, name), "0 or more")
        if not isinstance(self.job_variables, Mapping):
            raise InvalidValue(f"{where}.job_variables", self.job_variables, "a table of variables")
        if self.prices is not None:
            price_list(self.prices)
        if self.docker_host is not None:
            address_of(self.docker_host)

    @property
    def pool(self) -> Pool:
        """Its sizes, worker counts and prices."""
        return Pool(self.name, self.sizes, self.prices, self.workers)

    @property
    def capacity(self) -> Capacity:
        """Its concurrency."""
        return Capacity(workers=self.concurrency)

    def lacks_gpus(self) -> str:
        """Why its workers can have no GPU now, as its Docker engine says; empty where they may, or nobody can tell."""
        if self.docker_host is None or not any(size.gpu for size in self.sizes):
            return ""
        why = lack(self.docker_host)
        return f"work pool {self.name!r} has none: {why}" if why else ""

    def backend(self, client: Any) -> WorkPoolBackend:
        """A backend for one flow run, on the pilots of this process.

        Raises:
            WorkPoolUnusable: There is no such pool, or its base job template lacks variables that the sizes need.
        """
        return WorkPoolBackend(
            self._office(client),
            hardware=tuple(dict.fromkeys(size.hardware for size in self.sizes)),
            memory_mb=max(size.memory_mb for size in self.sizes),
            notice=warner(),
        )

    def _office(self, client: Any) -> Office:
        address = str(client.api_url) if getattr(client, "api_url", None) is not None else None
        with _lock:
            for definition, at, office in _offices:
                if definition == self and at == address:
                    return office
            office = self.new_office(address)
            _offices.append((self, address, office))
            return office

    def new_office(self, address: str | None = None) -> Office:
        """An office of its own for the pool, which has to be shut in the end.

        Args:
            address: Of the API; ``None`` as the settings say.

        Raises:
            WorkPoolUnusable: As ``backend``.
        """
        store: Store = self.storage
        jobs = Jobs(self.name, address, self.queue)
        found = jobs.work_pool()
        sizing = checked(found, self.sizing, self.sizes, self.job_variables)
        jobs.prepare()
        if found.type == "docker" and self.docker_host is None and any(size.gpu for size in self.sizes):
            warner()(
                f"Nobody has looked whether containers of work pool {self.name!r} may have GPUs: where its Docker "
                "engine has none, their jobs do not start. With WorkPool(docker_host=...) the engine there is asked."
            )
        terms = Terms(self.concurrency, self.idle_s, self.lifetime_s, self.patience_s, self.give_up_s, self.heartbeat_s)
        variables = dict(self.job_variables)
        overhead_mb = self.overhead_mb

        def of(size: Size) -> dict[str, Any]:
            return job_variables(sizing, size, overhead_mb=overhead_mb, given=variables)

        in_common = found.type == "process"  # containers and machines of their own are given their GPUs
        return Office(self.name, jobs, store, of, terms, copy_context(), places_gpus=in_common)


_lock = threading.Lock()
_offices: list[tuple[WorkPool, str | None, Office]] = []


def shut_offices() -> None:
    """Send the pilots of this process home."""
    with _lock:
        offices, _offices[:] = [office for _, _, office in _offices], []
    for office in offices:
        office.shut()


def _forget_after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _offices.clear()


atexit.register(shut_offices)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)

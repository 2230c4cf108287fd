"""Pools on clusters that people already run, for ``SLOTaskRunner(pools=[...])`` and ``@slo(pools=[...])``."""

from __future__ import annotations

import logging
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

from prefect.context import FlowRunContext
from prefect.utilities.importtools import from_qualified_name

from prefect_slo.errors import InvalidValue, SloError
from prefect_slo.pricing import price_list
from prefect_slo.resources import Capacity, Pool, Size
from prefect_slo.runner.backends.cluster import KEEP_BYTES, ClusterBackend
from prefect_slo.runner.backends.cluster_client import Cluster
from prefect_slo.runner.backends.local import worker_environment
from prefect_slo.runner.backends.protocol import Backend
from prefect_slo.runner.ids import uuid7
from prefect_slo.runner.local.limits import machine_memory_mb, machine_vcpus
from prefect_slo.runner.notices import Notice, warner
from prefect_slo.runner.pools import sizes_on, worker_counts
from prefect_slo.units import finite

if TYPE_CHECKING:
    from prefect_slo.runner.backends.dask_cluster import Made

MANY = 64
"""Bundles at once of a flow that had its cluster before: the scheduler queues what finds no room."""

LOOPBACK: Mapping[str, Any] = {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}
"""Of a Dask cluster in this process: without an address its web servers would listen on every interface."""

NO_DASHBOARD: Mapping[str, Any] = {"scheduler_kwargs": {"dashboard": False}}
"""Of one whose user has named no address for it."""

QUANTITIES = ("vcpus", "memory_mb", "gpu")


@dataclass(frozen=True)
class _ClusterPool(ABC):
    """What pools on clusters have in common.

    Args:
        address: Of the cluster; ``None`` starts one on this machine for the length of a flow run.
        sizes: Sizes that it offers.
        workers: Worker counts for menus; by default powers of four up to ``concurrency``.
        concurrency: Bundles that a flow run may have under way at once.
        resources: By quantity of a size (``vcpus``, ``memory_mb``, ``gpu``), the cluster's name for it.
        prices: Price list.
        name: What tasks, menus and plans call the pool.
        options: Further arguments of the client, as its library takes them.
        capped: Whether items are held to the memory of their size.
        keep_mb: Results of at least so many megabytes, pickled, stay on the cluster until the flow reads them, and go
            to the stages that take them there past the flow's process; ``None`` for none.
    """

    address: str | None = None
    sizes: tuple[Size, ...] = (Size(1, 1024),)
    workers: tuple[int, ...] = ()
    concurrency: int = 8
    resources: Mapping[str, str] = field(default_factory=dict)
    prices: str = "local"
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    capped: bool = True
    keep_mb: float | None = KEEP_BYTES / 2**20

    _package: ClassVar[str]
    _extra: ClassVar[str]
    _tables: ClassVar[tuple[str, ...]] = ("resources", "options")

    def __post_init__(self) -> None:
        if find_spec(self._package) is None:
            raise SloError(f"{type(self).__name__} needs {self._package}: pip install 'prefect-slo[{self._extra}]'")
        object.__setattr__(self, "sizes", sizes_on(self._extra, self.sizes, self._extra))
        object.__setattr__(self, "workers", worker_counts(self.workers, self.concurrency, self._extra))
        for name in self._tables:
            if not isinstance(table := getattr(self, name), Mapping) and table is not None:
                raise InvalidValue(f"{self._extra}.{name}", table, "a table")
        for quantity in self.resources:
            if quantity not in QUANTITIES:
                raise InvalidValue(f"{self._extra}.resources", quantity, f"one of {', '.join(QUANTITIES)}")
        price_list(self.prices)
        if self.keep_mb is not None and finite(self.keep_mb, f"{self._extra}.keep_mb") < 0:
            raise InvalidValue(f"{self._extra}.keep_mb", self.keep_mb, "megabytes, or None")

    @property
    def pool(self) -> Pool:
        """Its sizes, worker counts and prices."""
        return Pool(
            self.name, self.sizes, self.prices, self.workers, "workers" if self.keep_mb is not None else "calls"
        )

    @property
    def capacity(self) -> Capacity:
        """Its concurrency."""
        return Capacity(workers=self.concurrency)

    def backend(self, client: Any) -> Backend:
        """A backend for one flow run."""
        context = FlowRunContext.get()
        run = context.flow_run if context is not None else None
        key = str(run.id if run is not None else uuid7())
        keep = int(self.keep_mb * 2**20) if self.keep_mb is not None else None
        notice = warner()
        return ClusterBackend(
            self._cluster(notice),
            worker_environment(client),
            key,
            capped=self.capped,
            keep=keep,
            grows=self._grows,
            notice=notice,
        )

    @property
    def _grows(self) -> bool:
        """Whether the cluster grows with what is expected of it."""
        return False

    @abstractmethod
    def _cluster(self, notice: Notice) -> Cluster:
        """The cluster, as a backend uses it."""

    @property
    def _here(self) -> dict[str, float]:
        """What a cluster on this machine declares of the resources that sizes take."""
        have = {"vcpus": machine_vcpus(), "memory_mb": machine_memory_mb(), "gpu": sum(s.gpu for s in self.sizes)}
        return {name: have[quantity] for quantity, name in self.resources.items()}


@dataclass(frozen=True)
class DaskPool(_ClusterPool):
    """Workers on a Dask cluster: the one at ``address``, one made by ``cluster``, or one in this process.

    Every bundle is one task of the cluster. On an existing cluster, start workers with the resources that sizes take,
    e.g. ``dask worker tcp://... --resources "CPU=4 MEMORY=16384"`` with ``resources={"vcpus": "CPU", "memory_mb":
    "MEMORY"}``; without ``resources``, a bundle takes one thread of a worker, whatever its size.

    Args:
        cluster: Makes a cluster for a flow run, e.g. ``dask_kubernetes.operator.KubeCluster`` or its name as text;
            closed at its end.
        cluster_options: Its arguments.
        adapt: Arguments of its ``adapt``: it then grows and shrinks by what is queued, and by what a plan says of the
            stages that are under way or next: it is told before their bundles queue.

    The other arguments, which pools on clusters have in common, are those of ``RayPool``.

    Raises:
        SloError: Dask is not installed.
        InvalidValue: A setting that can't be.
    """

    name: str = "dask"
    cluster: Callable[..., Any] | str | None = None
    cluster_options: Mapping[str, Any] = field(default_factory=dict)
    adapt: Mapping[str, Any] | None = None

    _package: ClassVar[str] = "distributed"
    _extra: ClassVar[str] = "dask"
    _tables: ClassVar[tuple[str, ...]] = ("resources", "options", "cluster_options", "adapt")

    def __post_init__(self) -> None:
        if self.address is not None and self.cluster is not None:
            raise InvalidValue("dask.cluster", self.cluster, "none where an address is given")
        super().__post_init__()

    @classmethod
    def of(cls, runner: Any) -> DaskPool:
        """The pool that stands for a ``DaskTaskRunner`` of prefect-dask."""
        options, cluster = dict(runner.client_kwargs or {}), runner._cluster
        if runner.address or cluster is not None:
            address = runner.address or cluster.scheduler_address
            if (security := getattr(cluster, "security", None)) is not None:
                options.setdefault("security", security)
            return cls(address=address, concurrency=MANY, options=options, capped=False)
        return cls(
            cluster=runner.cluster_class,
            cluster_options=dict(runner.cluster_kwargs or {}),
            adapt=runner.adapt_kwargs or None,
            concurrency=MANY if runner.cluster_class is not None else max(int(machine_vcpus()), 1),
            options=options,
            capped=False,
        )

    def _cluster(self, notice: Notice) -> Cluster:
        from prefect_slo.runner.backends.dask_cluster import DaskCluster

        return DaskCluster(self._connect, self.resources, own=self.address is None)

    @property
    def _grows(self) -> bool:
        return self.adapt is not None

    def _connect(self) -> Made:
        from distributed import Client, LocalCluster

        options = {"set_as_default": False, **self.options}
        if self.address is not None:
            client = Client(self.address, **options)
            return client, client.close, None
        with ExitStack() as made:
            if self.cluster is not None:
                make = self.cluster if callable(self.cluster) else from_qualified_name(self.cluster)
                cluster = make(**self.cluster_options)
            else:
                if self.cluster_options.get("silence_logs", True):
                    made.enter_context(_DASK_LOG.hushed())
                workers = int(self.cluster_options.get("n_workers") or 1)
                share = {name: have / workers for name, have in self._here.items()}
                here = {"n_workers": 1, "threads_per_worker": ceil(self.concurrency / workers), "resources": share}
                shown = {} if "dashboard_address" in self.cluster_options else NO_DASHBOARD
                # bundles run in processes of their own
                cluster = LocalCluster(**{"processes": False, **LOOPBACK, **shown, **here, **self.cluster_options})
            made.callback(cluster.close)
            at_least = _at_least(cluster.adapt(**self.adapt)) if self.adapt is not None else None
            client = Client(cluster, **options)
            made.callback(client.close)
            return client, made.pop_all().close, at_least


class _Hushed:
    """Dask's log while clusters of ours run in this process.

    Dask silences its own handler then, but not that of Prefect, which prints every step of a cluster's life.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._level = threading.Lock(), 0, logging.NOTSET

    @contextmanager
    def hushed(self) -> Iterator[None]:
        """Inside, it says warnings alone."""
        log = logging.getLogger("distributed")
        with self._lock:
            if self._users == 0:
                self._level = log.level
                log.setLevel(max(self._level, logging.WARNING))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    log.setLevel(self._level)


_DASK_LOG = _Hushed()


def _at_least(adaptive: Any) -> Callable[[int], None]:
    """Has adaptive scaling hold so many workers at least, within what it may hold at all."""
    least = adaptive.minimum

    def hold(workers: int) -> None:
        adaptive.minimum = int(min(max(least, workers), adaptive.maximum))

    return hold


@dataclass(frozen=True)
class RayPool(_ClusterPool):
    """Workers on a Ray cluster: the one at ``address``, the one that this process is connected to, or one started here.

    Every bundle is one Ray task with the ``num_cpus``, ``num_gpus`` and ``memory`` of its size; fractions of a GPU are
    Ray's.

    Args:
        address: Of the cluster; ``None`` starts one on this machine for the length of a flow run.
        sizes: Sizes that it offers.
        workers: Worker counts for menus; by default powers of four up to ``concurrency``.
        concurrency: Bundles that a flow run may have under way at once.
        resources: By quantity of a size (``vcpus``, ``memory_mb``, ``gpu``), the cluster's own name for it.
        prices: Price list.
        name: What tasks, menus and plans call the pool.
        options: Further arguments of ``ray.init``.
        capped: Whether items are held to the memory of their size.
        keep_mb: Results of at least so many megabytes stay on the cluster until the flow reads them; ``None`` for none.
        ahead: Whether Ray's autoscaler is asked for what a plan says of the stages that are under way or next, before
            their bundles queue. It holds one request for the whole cluster: that of somebody else is left alone.

    Raises:
        SloError: Ray is not installed.
        InvalidValue: A setting that can't be.
    """

    name: str = "ray"
    ahead: bool = True

    _package: ClassVar[str] = "ray"
    _extra: ClassVar[str] = "ray"

    @classmethod
    def of(cls, runner: Any) -> RayPool:
        """The pool that stands for a ``RayTaskRunner`` of prefect-ray."""
        return cls(address=runner.address, concurrency=MANY, options=dict(runner.init_kwargs or {}), capped=False)

    def _cluster(self, notice: Notice) -> Cluster:
        from prefect_slo.runner.backends.ray_cluster import RayCluster

        own = self.address in (None, "local") and not _connected_to_ray()
        return RayCluster(self._connect, self.resources, memory=self.capped, own=own, notice=notice)

    @property
    def _grows(self) -> bool:
        """Whether it is asked for nodes: a cluster that is started here has no autoscaler."""
        return self.ahead and (self.address not in (None, "local") or _connected_to_ray())

    def _connect(self) -> Callable[[], None]:
        here = {"include_dashboard": False, "resources": self._here or None} if self.address is None else {}
        return _RAY.join(self.address or "local", {"log_to_driver": False, **here, **self.options})


def _connected_to_ray() -> bool:
    """Whether this process is, by the user or for another flow run."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


class _Ray:
    """This process' one connection to Ray, shared by the flow runs that use it; the last of them ends it."""

    def __init__(self) -> None:
        self._lock, self._users, self._address = threading.Lock(), 0, ""

    def join(self, address: str, options: Mapping[str, Any]) -> Callable[[], None]:
        """Connect, or use the connection that there is; returns how to leave it.

        Raises:
            SloError: This process is connected to another cluster for another flow run.
        """
        import ray

        with self._lock:
            if self._users == 0:
                if ray.is_initialized():  # by the user: theirs to end
                    return lambda: None
                ray.init(address=address, **options)
                self._address = address
            elif address != self._address:
                raise SloError(
                    f"this process is connected to Ray at {self._address!r} and can't be at {address!r} as well: run "
                    "the flows in processes of their own"
                )
            self._users += 1
        return self._leave

    def _leave(self) -> None:
        import ray

        with self._lock:
            self._users -= 1
            if self._users == 0:
                ray.shutdown()


_RAY = _Ray()

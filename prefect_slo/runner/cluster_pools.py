"""Pools on clusters that people already run, for ``SLOTaskRunner(pools=[...])`` and ``@slo(pools=[...])``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from prefect.context import FlowRunContext
from prefect.utilities.importtools import from_qualified_name

from prefect_slo.errors import InvalidValue, SloError
from prefect_slo.pricing import price_list
from prefect_slo.resources import Capacity, Pool, Size
from prefect_slo.runner.backends.cluster import Cluster, ClusterBackend
from prefect_slo.runner.backends.local import worker_environment
from prefect_slo.runner.backends.protocol import Backend
from prefect_slo.runner.ids import uuid7
from prefect_slo.runner.local.limits import machine_memory_mb, machine_vcpus
from prefect_slo.units import instances, whole

if TYPE_CHECKING:
    from distributed import Client

MANY = 64
"""Bundles at once of a flow that had its cluster before: the scheduler queues what finds no room."""

QUANTITIES = ("vcpus", "memory_mb", "gpu")


@dataclass(frozen=True)
class _ClusterPool:
    """What pools on clusters have in common.

    Args:
        address: Of the cluster; ``None`` starts one on this machine for the length of a flow run.
        sizes: Sizes that it offers.
        workers: Worker counts for menus; by default powers of two up to ``concurrency``.
        concurrency: Bundles that a flow run may have under way at once.
        resources: By quantity of a size (``vcpus``, ``memory_mb``, ``gpu``), the cluster's name for it.
        prices: Price list.
        name: What tasks, menus and plans call the pool.
        options: Further arguments of the client, as its library takes them.
    """

    address: str | None = None
    sizes: tuple[Size, ...] = (Size(1, 1024),)
    workers: tuple[int, ...] = ()
    concurrency: int = 8
    resources: Mapping[str, str] = field(default_factory=dict)
    prices: str = "local"
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    _package: ClassVar[str]
    _extra: ClassVar[str]

    def __post_init__(self) -> None:
        if find_spec(self._package) is None:
            raise SloError(f"{type(self).__name__} needs {self._package}: pip install 'prefect-slo[{self._extra}]'")
        sizes = instances(Size, self.sizes, f"{self._extra}.sizes")
        if not sizes:
            raise InvalidValue(f"{self._extra}.sizes", self.sizes, "at least one size")
        # measured apart from what this machine takes, unless the size says what kind of machine it means
        own = tuple(replace(size, hardware=self._extra) if size.hardware == "cpu" else size for size in sizes)
        object.__setattr__(self, "sizes", own)
        whole(self.concurrency, f"{self._extra}.concurrency")
        counts = tuple(self.workers) or (*(2**k for k in range(10) if 2**k < self.concurrency), self.concurrency)
        if max(counts) > self.concurrency:
            raise InvalidValue(f"{self._extra}.workers", self.workers, f"at most the concurrency of {self.concurrency}")
        object.__setattr__(self, "workers", counts)
        for quantity in self.resources:
            if quantity not in QUANTITIES:
                raise InvalidValue(f"{self._extra}.resources", quantity, f"one of {', '.join(QUANTITIES)}")
        price_list(self.prices)

    @property
    def pool(self) -> Pool:
        """Its sizes, worker counts and prices."""
        return Pool(self.name, self.sizes, self.prices, self.workers)

    @property
    def capacity(self) -> Capacity:
        """Its concurrency."""
        return Capacity(workers=self.concurrency)

    def backend(self, client: Any) -> Backend:
        """A backend for one flow run."""
        context = FlowRunContext.get()
        run = context.flow_run if context is not None else None
        return ClusterBackend(self._cluster(), worker_environment(client), str(run.id if run is not None else uuid7()))

    def _cluster(self) -> Cluster:
        raise NotImplementedError

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
        adapt: Arguments of its ``adapt``: it then grows and shrinks by what is queued.

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
            return cls(address=address, concurrency=MANY, options=options)
        return cls(
            cluster=runner.cluster_class,
            cluster_options=dict(runner.cluster_kwargs or {}),
            adapt=runner.adapt_kwargs or None,
            concurrency=MANY,
            options=options,
        )

    def _cluster(self) -> Cluster:
        from prefect_slo.runner.backends.dask_cluster import DaskCluster

        return DaskCluster(self._connect, self.resources)

    def _connect(self) -> tuple[Client, Callable[[], None]]:
        from distributed import Client, LocalCluster

        options = {"set_as_default": False, **self.options}
        if self.address is not None:
            client = Client(self.address, **options)
            return client, client.close
        if self.cluster is not None:
            made = self.cluster if callable(self.cluster) else from_qualified_name(self.cluster)
            cluster = made(**self.cluster_options)
        else:
            here = {"n_workers": 1, "threads_per_worker": self.concurrency, "resources": self._here}
            # bundles run in processes of their own
            cluster = LocalCluster(**{"processes": False, "dashboard_address": None, **here, **self.cluster_options})
        if self.adapt is not None:
            cluster.adapt(**self.adapt)
        client = Client(cluster, **options)

        def close() -> None:
            client.close()
            cluster.close()

        return client, close


@dataclass(frozen=True)
class RayPool(_ClusterPool):
    """Workers on a Ray cluster: the one at ``address``, the one that this process is connected to, or one started here.

    Every bundle is one Ray task with the ``num_cpus``, ``num_gpus`` and ``memory`` of its size; fractions of a GPU are
    Ray's.

    Args:
        address: Of the cluster; ``None`` starts one on this machine for the length of a flow run.
        sizes: Sizes that it offers.
        workers: Worker counts for menus; by default powers of two up to ``concurrency``.
        concurrency: Bundles that a flow run may have under way at once.
        resources: By quantity of a size (``vcpus``, ``memory_mb``, ``gpu``), the cluster's own name for it.
        prices: Price list.
        name: What tasks, menus and plans call the pool.
        options: Further arguments of ``ray.init``.

    Raises:
        SloError: Ray is not installed.
        InvalidValue: A setting that can't be.
    """

    name: str = "ray"

    _package: ClassVar[str] = "ray"
    _extra: ClassVar[str] = "ray"

    @classmethod
    def of(cls, runner: Any) -> RayPool:
        """The pool that stands for a ``RayTaskRunner`` of prefect-ray."""
        return cls(address=runner.address, concurrency=MANY, options=dict(runner.init_kwargs or {}))

    def _cluster(self) -> Cluster:
        from prefect_slo.runner.backends.ray_cluster import RayCluster

        return RayCluster(self._connect, self.resources)

    def _connect(self) -> Callable[[], None]:
        import ray

        if ray.is_initialized():
            return lambda: None
        here = {"include_dashboard": False, "resources": self._here or None} if self.address is None else {}
        ray.init(address=self.address or "local", **{"log_to_driver": False, **here, **self.options})
        shutdown: Callable[[], None] = ray.shutdown
        return shutdown

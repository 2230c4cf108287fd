"""A block for a pool beyond this machine, so that flows and deployments share its definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar

from pydantic import Field

from prefect_slo.aws.batch import BatchJobs
from prefect_slo.aws.queues import BatchQueue
from prefect_slo.blocks.documents import DocumentBlock
from prefect_slo.blocks.storage import S3PrefixBlock
from prefect_slo.control.delegation import Needs
from prefect_slo.errors import InvalidValue
from prefect_slo.resources import Size
from prefect_slo.runner.aws_pools import BatchPool, LambdaPool
from prefect_slo.runner.cluster_pools import DaskPool, RayPool
from prefect_slo.runner.pools import PoolDefinition
from prefect_slo.runner.work_pools import WorkPool
from prefect_slo.runner.workpool.sizing import Sizing
from prefect_slo.units import items

KINDS: Mapping[str, Callable[..., PoolDefinition]] = {
    "work-pool": WorkPool,
    "lambda": LambdaPool,
    "batch": BatchPool,
    "dask": DaskPool,
    "ray": RayPool,
}
PLACES = ("storage", "bucket")
"""Fields that say where arguments and results lie: an address, or the name of an ``slo-s3-prefix`` block."""

BLOCK = "slo-s3-prefix/"


class PoolBlock(DocumentBlock):
    """A pool that stages run on: a Prefect work pool of any type, AWS Lambda or Batch, a Dask or a Ray cluster.

    Example:
        Have a flow use a pool that is stored on the server:
        ```python
        from prefect_slo import slo
        from prefect_slo.blocks import PoolBlock

        decorate = slo(latency="30s", pools=[PoolBlock.load("BLOCK_NAME").pool])
        ```
    """

    _block_type_name: ClassVar[str] = "SLO Pool"
    _block_type_slug: ClassVar[str] = "slo-pool"

    document: dict[str, Any] = Field(
        description=f"kind ({', '.join(KINDS)}), and the arguments of WorkPool, LambdaPool, BatchPool, DaskPool or "
        "RayPool; sizes, batch, jobs, needs and sizing as tables."
    )

    @classmethod
    def _check(cls, document: dict[str, Any]) -> None:
        _definition(document, place=_unread)

    @property
    def pool(self) -> PoolDefinition:
        """The pool as a value; a stored prefix that it names is read now."""
        return _definition(self.document, place=_read)


def _definition(document: Mapping[str, Any], *, place: Callable[[Any], Any]) -> PoolDefinition:
    """The definition that a document describes.

    Raises:
        InvalidValue: A kind, a field or a value that there isn't.
    """
    given = dict(document)
    kind = given.pop("kind", "work-pool")
    if kind not in KINDS:
        raise InvalidValue("pool.kind", kind, f"one of {', '.join(KINDS)}")
    made: PoolDefinition = _made(KINDS[kind], given, "pool", {**_READERS, **dict.fromkeys(PLACES, place)})
    return made


def _made(kind: Callable[..., Any], table: Any, where: str, read: Mapping[str, Callable[[Any], Any]]) -> Any:
    """What a table of its fields describes; lists are tuples, and fields with a reader are read by it."""
    if not isinstance(table, Mapping):
        raise InvalidValue(where, table, f"a table of {kind.__name__}'s fields")
    known = {field.name: field for field in fields(kind) if field.init}  # type: ignore[arg-type]
    for name in table:
        if name not in known:
            raise InvalidValue(f"a field of {where}", name, f"one of {', '.join(sorted(known))}")
    for name, field in known.items():
        if field.default is MISSING and field.default_factory is MISSING and name not in table:
            raise InvalidValue(f"{where}.{name}", None, f"a value: {kind.__name__} has no default for it")
    given = {name: read[name](value) if name in read and value is not None else value for name, value in table.items()}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _sizes(tables: Any) -> tuple[Size, ...]:
    return tuple(_made(Size, table, "pool.sizes", {}) for table in items(tables, "pool.sizes"))


def _jobs(table: Any) -> BatchJobs:
    made: BatchJobs = _made(BatchJobs, table, "pool.jobs", {"queue": _queue})
    return made


def _queue(queue: Any) -> Any:
    return queue if isinstance(queue, str) else _made(BatchQueue, queue, "pool.jobs.queue", {})


def _needs(table: Any) -> Needs:
    made: Needs = _made(Needs, table, "pool.needs", {})
    return made


def _sizing(table: Any) -> Sizing:
    expected = f"a table with some of {', '.join(SIZING)}, as prefect_slo/runner/workpool/sizing.toml has them"
    if not isinstance(table, Mapping) or set(table) - set(SIZING):
        raise InvalidValue("pool.sizing", table, expected)
    try:
        return Sizing.read(table)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidValue("pool.sizing", table, f"{expected} ({error})") from None


SIZING = ("rules", "machines", "gpu_machines", "machine_variable", "gpus")
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "sizes": _sizes,
    "jobs": _jobs,
    "batch": _jobs,
    "needs": _needs,
    "sizing": _sizing,
}


def _read(place: Any) -> Any:
    if not isinstance(place, str) or not place.startswith(BLOCK):
        return place
    return S3PrefixBlock.load(place.removeprefix(BLOCK), _sync=True)  # type: ignore[call-arg]


def _unread(place: Any) -> Any:
    """Stands for a stored prefix where only the form of a document is checked."""
    return "s3://stored" if isinstance(place, str) and place.startswith(BLOCK) else place

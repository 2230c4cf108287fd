"""A block for a pool beyond this machine, so that flows and deployments share its definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar

from prefect.blocks.core import Block
from pydantic import Field, HttpUrl, field_validator

from prefect_slo.blocks.documents import DOCUMENTATION, LOGO
from prefect_slo.blocks.storage import S3PrefixBlock
from prefect_slo.errors import InvalidValue
from prefect_slo.resources import Size
from prefect_slo.runner.aws_pools import LambdaPool
from prefect_slo.runner.pools import PoolDefinition
from prefect_slo.runner.work_pools import WorkPool

KINDS: Mapping[str, Callable[..., PoolDefinition]] = {"work-pool": WorkPool, "lambda": LambdaPool}
PLACES = ("storage", "bucket")
"""Fields that say where arguments and results lie: an address, or the name of an ``slo-s3-prefix`` block."""

BLOCK = "slo-s3-prefix/"


class PoolBlock(Block):
    """A pool that stages run on: a Prefect work pool of any type, or AWS Lambda; its sizes, storage and limits.

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
    _logo_url: ClassVar[HttpUrl] = LOGO
    _documentation_url: ClassVar[HttpUrl] = DOCUMENTATION

    document: dict[str, Any] = Field(
        description="kind (work-pool or lambda), and the arguments of WorkPool or LambdaPool; sizes as tables."
    )

    @field_validator("document")
    @classmethod
    def _is_a_pool(cls, document: dict[str, Any]) -> dict[str, Any]:
        _definition(document, place=_unread)
        return document

    @property
    def pool(self) -> PoolDefinition:
        """The pool as a value; a stored prefix that it names is read now."""
        return _definition(self.document, place=_read)


def _definition(document: Mapping[str, Any], *, place: Callable[[str], Any]) -> PoolDefinition:
    """The definition that a document describes.

    Raises:
        InvalidValue: A kind, a field or a value that there isn't.
    """
    given = dict(document)
    kind = given.pop("kind", "work-pool")
    if kind not in KINDS:
        raise InvalidValue("pool.kind", kind, f"one of {', '.join(KINDS)}")
    known = {field.name for field in fields(KINDS[kind])}  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise InvalidValue(f"pool.{name}", given[name], f"no such field: {', '.join(sorted(known))}")
    if "sizes" in given:
        given["sizes"] = tuple(_size(each) for each in given["sizes"])
    for name in PLACES:
        if isinstance(given.get(name), str):
            given[name] = place(given[name])
    return KINDS[kind](**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def _size(table: Any) -> Size:
    try:
        return Size(**table)
    except TypeError:
        raise InvalidValue(
            "pool.sizes", table, "tables with vcpus, memory_mb, and gpu or hardware if need be"
        ) from None


def _read(place: str) -> Any:
    if not place.startswith(BLOCK):
        return place
    return S3PrefixBlock.load(place.removeprefix(BLOCK), _sync=True)  # type: ignore[call-arg]


def _unread(place: str) -> Any:
    """Stands for a stored prefix where only the form of a document is checked."""
    return "s3://stored" if place.startswith(BLOCK) else place

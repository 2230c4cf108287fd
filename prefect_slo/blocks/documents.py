"""Blocks that hold a document which flows name: a menu, a price list, a plan."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from prefect.blocks.core import Block
from pydantic import Field, HttpUrl, field_validator

from prefect_slo.errors import InvalidValue
from prefect_slo.plan import Plan
from prefect_slo.pricing import PriceList
from prefect_slo.resources import Menu
from prefect_slo.workflow import Workflow

DOCUMENTATION = HttpUrl("https://github.com/prefect-slo/prefect-slo/tree/main/docs")
LOGO = HttpUrl("https://raw.githubusercontent.com/prefect-slo/prefect-slo/main/docs/assets/logo.png")


class DocumentBlock(Block):
    """A block that holds a document: one that isn't what the block is for is refused."""

    _logo_url: ClassVar[HttpUrl] = LOGO
    _documentation_url: ClassVar[HttpUrl] = DOCUMENTATION

    document: dict[str, Any]

    @field_validator("document")
    @classmethod
    def _can_be_read(cls, document: dict[str, Any]) -> dict[str, Any]:
        cls._check(document)
        return document

    @classmethod
    def _check(cls, document: dict[str, Any]) -> None:
        """Raise where a document isn't one."""
        raise NotImplementedError


class MenuBlock(DocumentBlock):
    """What the planner may choose from for a stage: worker counts, sizes, pools, batch sizes and prices.

    Example:
        See a menu that is stored on the server; ``@slo(latency="30s", menu="BLOCK_NAME")`` chooses from it:
        ```python
        from prefect_slo.blocks import MenuBlock

        menu = MenuBlock.load("BLOCK_NAME").menu
        ```
    """

    _block_type_name: ClassVar[str] = "SLO Menu"
    _block_type_slug: ClassVar[str] = "slo-menu"

    document: dict[str, Any] = Field(
        description="The menu as the [menu] table of a workflow file: prices, workers, sizes, pools, batch, knobs."
    )

    @classmethod
    def _check(cls, document: dict[str, Any]) -> None:
        _menu(document)

    @property
    def menu(self) -> Menu:
        """The menu as a value."""
        return _menu(self.document)


class PriceListBlock(DocumentBlock):
    """What a second of a worker costs: unit prices of one service in one region on one day.

    Example:
        Write a price list that is stored on the server to a file, whose path menus name:
        ```python
        from prefect_slo.blocks import PriceListBlock

        prices = PriceListBlock.load("BLOCK_NAME")
        prices.write("ours.toml")
        ```
    """

    _block_type_name: ClassVar[str] = "SLO Price List"
    _block_type_slug: ClassVar[str] = "slo-price-list"

    document: dict[str, Any] = Field(
        description="The price list as in a price file: name, vcpu_second, gb_second, gpu_second, as_of, region."
    )

    @classmethod
    def _check(cls, document: dict[str, Any]) -> None:
        PriceList.from_document(document)

    @classmethod
    def of(cls, prices: PriceList) -> PriceListBlock:
        """A block that holds this price list."""
        return cls(document={name: value for name, value in asdict(prices).items() if value not in (None, "", {})})

    @property
    def prices(self) -> PriceList:
        """The price list as a value."""
        return PriceList.from_document(self.document)

    def write(self, path: str | Path) -> Path:
        """Write the price list to a file that ``menu.prices`` can name, and return its path.

        Raises:
            InvalidValue: Another ending than ``.toml``, by which a path is told from a name.
        """
        path = Path(path)
        if path.suffix != ".toml":
            raise InvalidValue("path", str(path), "a path that ends in .toml")
        prices = asdict(self.prices)
        tables = prices.pop("hardware")
        lines = [f"{name} = {json.dumps(value)}" for name, value in prices.items() if value not in (None, "")]
        for hardware, rates in tables.items():
            lines += ["", f"[hardware.{json.dumps(hardware)}]", *(f"{name} = {rate!r}" for name, rate in rates.items())]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path


class PlanBlock(DocumentBlock):
    """A plan that flows can be pinned to: how many workers of which size each stage has, and where.

    Example:
        See a plan that is stored on the server; ``PREFECT_INTEGRATIONS_SLO_PLAN=BLOCK_NAME`` has runs follow it:
        ```python
        from prefect_slo.blocks import PlanBlock

        plan = PlanBlock.load("BLOCK_NAME").plan
        ```
    """

    _block_type_name: ClassVar[str] = "SLO Plan"
    _block_type_slug: ClassVar[str] = "slo-plan"

    document: dict[str, Any] = Field(description="The plan as in a plan file: workflow, objective, stages.")

    @classmethod
    def _check(cls, document: dict[str, Any]) -> None:
        Plan.from_document(document)

    @property
    def plan(self) -> Plan:
        """The plan as a value."""
        return Plan.from_document(self.document)


def _menu(document: dict[str, Any]) -> Menu:
    return Workflow.from_document({"name": "menu", "menu": document, "stages": [{"name": "any"}]})["any"].menu

"""Price lists as data: what a second of a worker costs, from ``prices/*.toml`` or a user's own file.

Cost of one worker held for ``t`` seconds at size ``(vcpus, memory_mb, gpu)``:

    cost = t · (vcpus · vcpu_second + memory_mb / 1024 · gb_second + gpu · gpu_second) + request

with ``t`` rounded up to ``granularity_s``. AWS Lambda prices memory alone, so its ``vcpu_second`` is 0 and its vCPU
follow from memory (``mb_per_vcpu``).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from prefect_slo.errors import InvalidValue, UnknownPrices
from prefect_slo.units import finite, positive

PRICES = Path(__file__).parent / "prices"


@dataclass(frozen=True)
class PriceList:
    """Unit prices of one service in one region on one day.

    Attributes:
        name: What a workflow's ``menu.prices`` names.
        vcpu_second: US dollars per vCPU and second.
        gb_second: US dollars per GB (1,024 MB) and second.
        gpu_second: US dollars per whole GPU and second.
        request: US dollars per dispatch of a worker (an invocation).
        granularity_s: Billed time is rounded up to a multiple of this.
        mb_per_vcpu: Memory that brings one vCPU where the two are tied; ``None`` where they are chosen apart.
        as_of: Day the prices were read, ISO format.
        region: Region they hold for.
        source: Where they were read.
        hardware: Overrides of the unit prices by hardware name, e.g. ``{"gpu": {"vcpu_second": ...}}``.
    """

    name: str
    vcpu_second: float = 0.0
    gb_second: float = 0.0
    gpu_second: float = 0.0
    request: float = 0.0
    granularity_s: float = 0.0
    mb_per_vcpu: float | None = None
    as_of: str = ""
    region: str = ""
    source: str = ""
    hardware: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vcpu_second", "gb_second", "gpu_second", "request", "granularity_s"):
            if finite(getattr(self, name), f"prices.{self.name}.{name}") < 0:
                raise InvalidValue(f"prices.{self.name}.{name}", getattr(self, name), "0 or more")
        if self.mb_per_vcpu is not None:
            positive(self.mb_per_vcpu, f"prices.{self.name}.mb_per_vcpu")

    def rate(self, vcpus: float, memory_mb: float, gpu: float = 0.0, hardware: str = "cpu") -> float:
        """US dollars per second that one worker of this size is held."""
        own = self.hardware.get(hardware, {})
        return (
            vcpus * own.get("vcpu_second", self.vcpu_second)
            + memory_mb / 1024.0 * own.get("gb_second", self.gb_second)
            + gpu * own.get("gpu_second", self.gpu_second)
        )

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> PriceList:
        """A price list from a parsed TOML or JSON document.

        Raises:
            InvalidValue: An unknown field, or a price that is not a finite number of at least 0.
        """
        known = set(cls.__dataclass_fields__)
        for key in document:
            if key not in known:
                raise InvalidValue(f"prices.{key}", document[key], f"one of {', '.join(sorted(known))}")
        if "name" not in document:
            raise InvalidValue("prices.name", None, "the name that menus refer to")
        return cls(**document)


@cache
def price_list(name: str) -> PriceList:
    """The price list of that name, or the one in the file at that path.

    Raises:
        UnknownPrices: Neither a shipped price list nor a file.
    """
    path = Path(name) if name.endswith(".toml") else PRICES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(shipped.stem for shipped in PRICES.glob("*.toml")))
        raise UnknownPrices("menu.prices", name, f"one of {known}, or a path to a .toml file")
    return PriceList.from_document(tomllib.loads(path.read_text()))

"""Price lists as data: what a second of a worker costs, from ``prices/*.toml`` or a user's own file.

Cost of one worker held for ``t`` seconds at size ``(vcpus, memory_mb, gpu)``:

    cost = t · (vcpus · vcpu_second + memory_mb / 1024 · gb_second + gpu · gpu_second) + request

with ``t`` rounded up to ``granularity_s``, and ``minimum_s`` at least. AWS Lambda prices memory alone, so its
``vcpu_second`` is 0 and its vCPU follow from memory (``mb_per_vcpu``).

A list of the same name in the folder that ``PREFECT_INTEGRATIONS_SLO_PRICES`` names goes before a shipped one.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from prefect_slo.errors import InvalidValue, UnknownPrices
from prefect_slo.units import finite, items, positive, text

PRICES = Path(__file__).parent / "prices"
OWN = "PREFECT_INTEGRATIONS_SLO_PRICES"
"""The variable that names a folder of the user's own when the package is imported: price lists, and ``services/`` for
what services charge beside time."""

Bills = Literal["leases", "calls"]
Confidence = Literal["high", "medium", "low", ""]
_RATES = ("vcpu_second", "gb_second", "gpu_second")
_AMOUNTS = ("request", "granularity_s", "minimum_s", "storage_gb_second", "storage_included_mb")


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
        minimum_s: Least time that is billed.
        bills: ``leases``: workers for as long as they are held; ``calls``: each invocation or job by itself. By default
            calls where a request has a price.
        mb_per_vcpu: Memory that brings one vCPU where the two are tied; ``None`` where they are chosen apart.
        tiers: What a GB-second costs from so many of a month on, as ``(gb_seconds, price)``, ascending; ``gb_second``
            holds below the first.
        storage_gb_second: US dollars per GB of temporary disk and second, beyond ``storage_included_mb``.
        storage_included_mb: Temporary disk that costs nothing.
        as_of: Day the prices were read, ISO format.
        region: Region they hold for.
        source: Where they were read.
        confidence: ``high``: read at the source; ``medium``: by hearsay that agrees; ``low``: an estimate.
        hardware: Overrides of the unit prices by hardware name, e.g. ``{"gpu": {"vcpu_second": ...}}``.

    Raises:
        InvalidValue: A price that is not a finite number of at least 0, or an override of something else.
    """

    name: str
    vcpu_second: float = 0.0
    gb_second: float = 0.0
    gpu_second: float = 0.0
    request: float = 0.0
    granularity_s: float = 0.0
    minimum_s: float = 0.0
    bills: Bills | None = None
    mb_per_vcpu: float | None = None
    tiers: tuple[tuple[float, float], ...] = ()
    storage_gb_second: float = 0.0
    storage_included_mb: float = 0.0
    as_of: str = ""
    region: str = ""
    source: str = ""
    confidence: Confidence = ""
    hardware: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"prices.{text(self.name, 'prices.name')}"
        for name in (*_RATES, *_AMOUNTS):
            object.__setattr__(self, name, _price(getattr(self, name), f"{where}.{name}"))
        if self.bills not in (None, "leases", "calls"):
            raise InvalidValue(f"{where}.bills", self.bills, "'leases' or 'calls'")
        object.__setattr__(self, "bills", self.bills or ("calls" if self.request > 0 else "leases"))
        if self.mb_per_vcpu is not None:
            object.__setattr__(self, "mb_per_vcpu", positive(self.mb_per_vcpu, f"{where}.mb_per_vcpu"))
        for name in ("as_of", "region", "source"):
            if not isinstance(getattr(self, name), str):
                raise InvalidValue(f"{where}.{name}", getattr(self, name), "a text")
        if self.confidence not in ("high", "medium", "low", ""):
            raise InvalidValue(f"{where}.confidence", self.confidence, "'high', 'medium' or 'low'")
        object.__setattr__(self, "tiers", _tiers(self.tiers, f"{where}.tiers"))
        object.__setattr__(self, "hardware", _overrides(self.hardware, f"{where}.hardware"))

    def rate(self, vcpus: float, memory_mb: float, gpu: float = 0.0, hardware: str = "cpu") -> float:
        """US dollars per second that one worker of this size is held."""
        own = self.hardware.get(hardware, {})
        return (
            vcpus * own.get("vcpu_second", self.vcpu_second)
            + memory_mb / 1024.0 * own.get("gb_second", self.gb_second)
            + gpu * own.get("gpu_second", self.gpu_second)
        )

    def is_by_gpu(self, hardware: str = "cpu") -> bool:
        """Whether the price of a machine of that kind is its GPU's alone: a worker without one would look free."""
        by_gpu = self.gpu_second or any(own.get("gpu_second") for own in self.hardware.values())
        return bool(by_gpu) and not self.request and not self.rate(1.0, 1024.0, 0.0, hardware)

    def billed_s(self, seconds: float) -> float:
        """Seconds that are billed for so many: rounded up, and no less than the least."""
        steps = math.ceil(seconds / self.granularity_s - 1e-9) if self.granularity_s > 0 else 0
        return max(steps * self.granularity_s if self.granularity_s > 0 else seconds, self.minimum_s)

    def after(self, gb_seconds: float) -> PriceList:
        """The list as it is for an account that has used so many GB-seconds this month: its price is that of the tier.

        Example:
            ``price_list("aws-lambda-x86").after(7e9).gb_second`` is $0.000015.
        """
        reached = [price for start, price in self.tiers if start <= gb_seconds]
        return replace(self, gb_second=reached[-1], tiers=self.tiers[len(reached) :]) if reached else self

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> PriceList:
        """A price list from a parsed TOML or JSON document.

        Raises:
            InvalidValue: An unknown field, or a price that is not a finite number of at least 0.
        """
        if not isinstance(document, Mapping):
            raise InvalidValue("prices", document, "a table")
        known = set(cls.__dataclass_fields__)
        for key in document:
            if key not in known:
                raise InvalidValue(f"prices.{key}", document[key], f"one of {', '.join(sorted(known))}")
        if "name" not in document:
            raise InvalidValue("prices.name", None, "the name that menus refer to")
        day = document.get("as_of")
        return cls(**{**document, "as_of": day.isoformat()} if isinstance(day, date) else document)


def price_list(name: str) -> PriceList:
    """The price list of that name, or the one in the file at that path (``.toml``).

    A file is read again when it has changed.

    Raises:
        UnknownPrices: Neither a shipped price list nor a readable file.
        InvalidValue: The file holds something that is not a price.
    """
    if not isinstance(name, str) or not name:
        raise UnknownPrices("menu.prices", name, _known())
    path = Path(name) if name.endswith(".toml") else shipped(f"{name}.toml")
    try:
        return _read(path.resolve(), path.stat().st_mtime_ns)
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidValue):
            raise
        reason = f" ({error})" if name.endswith(".toml") else ""
        raise UnknownPrices("menu.prices", name, _known() + reason) from None


def shipped(name: str) -> Path:
    """A file of prices: the user's own of that name where there is one, else the package's."""
    try:
        return next(path for folder in folders() if (path := folder / name).is_file())
    except (StopIteration, OSError, ValueError):  # none, or no name of a file
        return PRICES / name


def folders() -> tuple[Path, ...]:
    """Where price lists are looked for, in this order."""
    return (*_OWN_FOLDERS, PRICES)


def look_first_in(folder: str | Path | None) -> None:
    """From now on, lists of this folder of the user's own go before shipped ones of the same name."""
    _OWN_FOLDERS[:] = [Path(folder)] if folder is not None else []


_OWN_FOLDERS: list[Path] = []


@lru_cache(maxsize=64)
def _read(path: Path, _changed_ns: int) -> PriceList:
    return PriceList.from_document(tomllib.loads(path.read_text(encoding="utf-8")))


def _known() -> str:
    return f"one of {', '.join(sorted(path.stem for path in PRICES.glob('*.toml')))}, or a path to a .toml file"


def _price(value: object, where: str) -> float:
    number = finite(value, where)
    if number < 0:
        raise InvalidValue(where, value, "0 or more")
    return number


def _tiers(tiers: object, where: str) -> tuple[tuple[float, float], ...]:
    read: list[tuple[float, float]] = []
    for tier in items(tiers, where):
        if not isinstance(tier, (list, tuple)) or len(tier) != 2:
            raise InvalidValue(where, tier, "pairs of GB-seconds and a price")
        read.append((_price(tier[0], where), _price(tier[1], where)))
    if read != sorted(read, key=lambda tier: tier[0]):
        raise InvalidValue(where, tiers, "tiers in ascending order")
    return tuple(read)


def _overrides(hardware: object, where: str) -> dict[str, dict[str, float]]:
    if not isinstance(hardware, Mapping):
        raise InvalidValue(where, hardware, "a table of tables")
    read: dict[str, dict[str, float]] = {}
    for name, rates in hardware.items():
        if not isinstance(rates, Mapping):
            raise InvalidValue(f"{where}.{name}", rates, "a table of prices")
        for rate in rates:
            if rate not in _RATES:
                raise InvalidValue(f"{where}.{name}.{rate}", rates[rate], f"one of {', '.join(_RATES)}")
        read[text(name, where)] = {rate: _price(value, f"{where}.{name}.{rate}") for rate, value in rates.items()}
    return read

"""What services charge beside the time of workers, and how long they take to start: ``prices/services/*.toml``.

Each charge says its unit, the day it was read, where, and how sure it is. A file of the same name under ``services`` in
the folder that ``PREFECT_INTEGRATIONS_SLO_PRICES`` names goes before the package's, entry by entry.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefect_slo.errors import InvalidValue, UnknownPrices
from prefect_slo.pricing import folders
from prefect_slo.units import finite

FOLDER = "services"
_SHARED = ("as_of", "region", "source", "confidence")
_FIELDS = (*_SHARED, "value", "unit", "least", "most")


@dataclass(frozen=True)
class Charge:
    """One number of a service.

    Attributes:
        name: E.g. ``s3.put``.
        value: The number.
        unit: Of what: US dollars for something, seconds, a share.
        least: Where it is a guess, what it may be at least.
        most: And at most.
        as_of: Day it was read, ISO format.
        region: Region it holds for.
        source: Where it was read.
        confidence: ``high``, ``medium`` or ``low``.
    """

    name: str
    value: float
    unit: str
    least: float
    most: float
    as_of: str
    region: str
    source: str
    confidence: str


def charge(name: str, provider: str = "aws") -> Charge:
    """The charge of that name, e.g. ``charge("s3.put").value``.

    Raises:
        UnknownPrices: There is none.
        InvalidValue: A file of the user's own that holds something else.
    """
    known = charges(provider)
    if name not in known:
        raise UnknownPrices("charge", name, f"one of {', '.join(known)}")
    return known[name]


def charges(provider: str = "aws") -> dict[str, Charge]:
    """Every charge of a provider by name, the user's own before the package's.

    Raises:
        UnknownPrices: No such provider.
        InvalidValue: A file of the user's own that holds something else.
    """
    paths = [path for folder in reversed(folders()) if (path := folder / FOLDER / f"{provider}.toml").is_file()]
    if not paths:
        raise UnknownPrices("provider", provider, "aws")
    found: dict[str, Charge] = {}
    for path in paths:
        found |= _read(path, path.stat().st_mtime_ns)
    return found


@lru_cache(maxsize=16)
def _read(path: Path, _changed_ns: int) -> dict[str, Charge]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidValue("charges", str(path), f"a TOML file ({error})") from None
    shared = {name: document.pop(name, "") for name in _SHARED}
    found = {}
    for service, entries in document.items():
        if not isinstance(entries, Mapping):
            raise InvalidValue(f"charges.{service}", entries, "a table of charges")
        for name, entry in entries.items():
            found[f"{service}.{name}"] = _charge(f"{service}.{name}", entry, shared)
    return found


def _charge(name: str, entry: object, shared: Mapping[str, Any]) -> Charge:
    where = f"charges.{name}"
    if not isinstance(entry, Mapping) or "value" not in entry:
        raise InvalidValue(where, entry, "a table with a 'value'")
    for field in entry:
        if field not in _FIELDS:
            raise InvalidValue(f"{where}.{field}", entry[field], f"one of {', '.join(_FIELDS)}")
    value = finite(entry["value"], f"{where}.value")
    least, most = (finite(entry.get(field, value), f"{where}.{field}") for field in ("least", "most"))
    if not 0 <= least <= value <= most:
        raise InvalidValue(where, value, "0 or more, between its least and its most")
    words = {**shared, **{field: entry[field] for field in _SHARED if field in entry}}
    texts = {field: str(word.isoformat() if isinstance(word, date) else word) for field, word in words.items()}
    return Charge(name, value, str(entry.get("unit", "")), least, most, **texts)

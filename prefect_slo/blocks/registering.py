"""One command that makes everything that flows may name known to the Prefect API; running it again changes nothing.

A folder of documents looks like this, all of it optional:

    menus/*.toml      [menu] tables                        -> slo-menu/<file>
    prices/*.toml     price lists of your own              -> slo-price-list/<name>
    s3/*.toml         bucket, prefix, region, ...          -> slo-s3-prefix/<file>
    pools/*.toml      kind, name, sizes, storage, ...      -> slo-pool/<file>
    plans/*.json      plan files                           -> slo-plan/<file>
    profiles/*.toml   flow, and latency or budget_usd      -> slo-profile/<flow>, where there is none yet

``${NAME}`` in a document of TOML is the environment variable of that name; a document whose variables aren't set is
left out. What flows have learned is never touched: a profile is only made, with its bound, where a flow has none.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prefect.blocks.core import Block
from pydantic import ValidationError

from prefect_slo.blocks.documents import MenuBlock, PlanBlock, PriceListBlock
from prefect_slo.blocks.folding import update_profile
from prefect_slo.blocks.pools import PoolBlock
from prefect_slo.blocks.profile import SLOProfile
from prefect_slo.blocks.storage import S3PrefixBlock
from prefect_slo.errors import InvalidValue, SloError
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.pricing import PRICES, PriceList
from prefect_slo.telemetry.store import slug

TYPES: tuple[type[Block], ...] = (SLOProfile, MenuBlock, PriceListBlock, S3PrefixBlock, PoolBlock, PlanBlock)
_VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Registered:
    """What was stored.

    Attributes:
        stored: Slugs of the documents, such as ``slo-menu/local``.
        kept: Slugs of those that were there, and stay as they are: profiles.
        left_out: Files that were not, with the variables that they miss.
    """

    stored: tuple[str, ...]
    kept: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]]


class _Document(NamedTuple):
    """A document of the API, and whether it was there and stays as it is."""

    slug: str
    kept: bool = False


def register(folder: Path | None = None) -> Registered:
    """Register all block types, and store the package's price lists and the documents of a folder. Blocks.

    Raises:
        InvalidValue: A document that isn't one, in words that name its file, or a folder that holds none.
        httpx.HTTPError: The API cannot be reached.
    """
    if folder is not None and not any(_files(folder / kind) for kind in _STORES):
        inside = sorted(f"{each.name}/" if each.is_dir() else each.name for each in folder.iterdir())
        raise InvalidValue("folder", str(folder), f"documents in {', '.join(_STORES)}; it has {inside or 'nothing'}")
    for block in TYPES:
        block.register_type_and_schema(_sync=True)  # type: ignore[call-arg]
    left_out: dict[str, tuple[str, ...]] = {}
    found = [_store_prices(path, tomllib.loads(path.read_text())) for path in sorted(PRICES.glob("*.toml"))]
    for kind, store in _STORES.items():
        for path, document, missing in _documents(folder, kind):
            if missing:
                left_out[f"{kind}/{path.name}"] = missing
                continue
            try:
                found.append(store(path, document))
            except (SloError, ValueError, TypeError) as error:
                raise _refused(f"{kind}/{path.name}", document, error) from None
    stored, kept = (tuple(one.slug for one in found if one.kept is kept) for kept in (False, True))
    return Registered(stored, kept, left_out)


def _documents(folder: Path | None, kind: str) -> Iterator[tuple[Path, dict[str, Any], tuple[str, ...]]]:
    """Files of a kind, what they hold, and the variables that they miss."""
    for path in _files(folder / kind) if folder is not None else ():
        text = path.read_text(encoding="utf-8")
        used = tuple(dict.fromkeys(_VARIABLE.findall(text))) if path.suffix == ".toml" else ()
        missing = tuple(name for name in used if name not in os.environ)
        if missing:
            yield path, {}, missing
            continue
        for name in used:
            text = text.replace(f"${{{name}}}", os.environ[name])
        try:
            yield path, tomllib.loads(text) if path.suffix == ".toml" else json.loads(text), ()
        except ValueError as error:
            raise InvalidValue(f"{kind}/{path.name}", text, f"{path.suffix[1:].upper()} ({error})") from None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.*") if path.suffix in (".toml", ".json"))


def _refused(file: str, document: Mapping[str, Any], error: Exception) -> InvalidValue:
    """What is wrong in a file: our own words where there are some, also behind those of pydantic."""
    told = error.errors()[0].get("ctx", {}).get("error") if isinstance(error, ValidationError) else error
    if isinstance(told, InvalidValue):
        return InvalidValue(f"{file}: {told.field}", told.value, told.expected)
    return InvalidValue(file, document, f"a document that can be stored ({error})")


def _saved(block: Block, name: str) -> _Document:
    block.save(name, overwrite=True, _sync=True)  # type: ignore[call-arg]
    return _Document(f"{block.get_block_type_slug()}/{name}")


def _store_prices(path: Path, document: Mapping[str, Any]) -> _Document:
    prices = PriceList.from_document(document)
    return _saved(PriceListBlock.of(prices), prices.name)


def _store_profile(path: Path, document: Mapping[str, Any]) -> _Document:
    """A profile that knows its bound, where the flow has none; one that is there stays as it is."""
    fields = {"flow", "latency", "budget_usd", "percentile", "confidence"}
    if (unknown := set(document) - fields) or "flow" not in document:
        raise InvalidValue("profile", sorted(unknown) or document, f"flow and some of {', '.join(sorted(fields))}")
    at = (document.get("percentile", 0.95), document.get("confidence", 0.99))
    latency = Latency(document["latency"], *at) if "latency" in document else None
    slo = Slo(latency, Budget(document["budget_usd"], *at) if "budget_usd" in document else None)
    bound = {
        "latency_s": slo.latency.bound_s if slo.latency else None,
        "budget_usd": slo.budget.bound_usd if slo.budget else None,
        "percentile": at[0],
        "confidence": at[1],
    }
    flow_name = str(document["flow"])
    known = SLOProfile.of_flow(flow_name)
    if known is None:
        update_profile(flow_name, lambda p: p if p.revision else p.model_copy(update={"objective": bound}))
    return _Document(f"{SLOProfile.get_block_type_slug()}/{slug(flow_name)}", kept=known is not None)


_STORES: Mapping[str, Callable[[Path, dict[str, Any]], _Document]] = {
    "menus": lambda path, document: _saved(MenuBlock(document=document), path.stem),
    "prices": _store_prices,
    "s3": lambda path, document: _saved(S3PrefixBlock(**document), path.stem),
    "pools": lambda path, document: _saved(PoolBlock(document=document), path.stem),
    "plans": lambda path, document: _saved(PlanBlock(document=document), path.stem),
    "profiles": _store_profile,
}
"""By folder, what stores a document of it; S3 goes before the pools that name it."""

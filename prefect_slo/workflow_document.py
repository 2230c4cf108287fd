"""Workflow files: the form that ``docs/reference/files.md`` describes, read and written.

Values are checked where they become values (``Stage``, ``Menu``, ``Size``); here only the form of the document is:
which fields there are, and how a stage's own menu goes on top of the shared one.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect_slo.constraint import Constraint
from prefect_slo.errors import InvalidWorkflow
from prefect_slo.placement import Device, Interference
from prefect_slo.pricing import price_list
from prefect_slo.resources import RESOURCES, Capacity, Menu, Pool, Size
from prefect_slo.units import items, positive, text, whole
from prefect_slo.workflow import Edge, Stage, Workflow

_WORKFLOW = ("name", "menu", "stages", "constraints", "capacity", "schema")
_STAGE = ("name", "after", "after_items", "menu", "fanout", "items", "probability", "sequential", "opaque")
_SIZING = ("memory_mb", "vcpus", "sizes")
_MENU = ("prices", "workers", *_SIZING, "pools", "batch", "knobs", "hardware", "by_machine")
_POOL = ("name", "prices", "workers", *_SIZING, "hardware", "handing_on", "storage")
_SIZE = ("vcpus", "memory_mb", "gpu", "hardware", "gpu_memory_mb")
_LIMITS = (*RESOURCES, "gpu_devices", "gpu_slowdown")
_CAPACITY = (*_LIMITS, "pools")
_DEVICE = ("name", "memory_mb", "cores")


def load(path: str | Path) -> Workflow:
    """Read a workflow file; a price list that it names by a relative path lies beside it.

    Raises:
        InvalidWorkflow: The file is missing, is not what its suffix says, or describes no valid workflow.
    """
    if not isinstance(path, (str, Path)):
        raise InvalidWorkflow("workflow", path, "the path of a .toml or .json file")
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
        document = json.loads(content) if path.suffix.lower() == ".json" else tomllib.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidWorkflow("workflow", str(path), f"a readable .toml or .json file ({error})") from None
    return read(document, folder=path.parent)


def read(document: Mapping[str, Any], *, folder: Path | None = None) -> Workflow:
    """A workflow from a parsed document.

    Args:
        document: What a TOML or JSON parser returned.
        folder: Where price lists with a relative path lie; ``None`` for the working directory.

    Raises:
        InvalidValue: Unknown or missing fields, or values outside what they may hold.
    """
    _only(document, _WORKFLOW, "workflow")
    shared = document.get("menu", {})
    _only(shared, _MENU, "menu")
    return Workflow(
        name=document.get("name", "workflow"),
        stages=tuple(_stage(entry, shared, folder) for entry in _tables(document.get("stages"), "stages", _STAGE)),
        constraints=tuple(Constraint.parse(line) for line in items(document.get("constraints", ()), "constraints")),
        capacity=_capacity(document.get("capacity", {})),
    )


def write(workflow: Workflow) -> dict[str, Any]:
    """The document that ``read`` turns into an equal workflow."""
    document: dict[str, Any] = {"name": workflow.name, "stages": [_stage_document(s) for s in workflow.stages]}
    if workflow.constraints:
        document["constraints"] = [str(constraint) for constraint in workflow.constraints]
    if capacity := _capacity_document(workflow.capacity):
        document["capacity"] = capacity
    return document


def _capacity(document: object) -> Capacity:
    limits = dict(_only(document, _CAPACITY, "capacity"))
    pools = limits.pop("pools", {})
    if not isinstance(pools, Mapping):
        raise InvalidWorkflow("capacity.pools", pools, "a table of capacities by pool")
    own = {
        text(pool, "capacity.pools"): _limits(_only(entry, _LIMITS, f"capacity.pools.{pool}"), f"capacity.pools.{pool}")
        for pool, entry in pools.items()
    }
    return Capacity(**_limits(limits, "capacity"), pools={pool: Capacity(**entry) for pool, entry in own.items()})


def _limits(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a capacity, with its GPUs as values."""
    read = dict(entry)
    if "gpu_devices" in read:
        tables = _tables(read["gpu_devices"], f"{where}.gpu_devices", _DEVICE)
        for table in tables:
            for name in _DEVICE[:2]:
                if name not in table:
                    raise InvalidWorkflow(f"{where}.gpu_devices.{name}", None, "given for every device")
        read["gpu_devices"] = tuple(Device(**table) for table in tables)
    if "gpu_slowdown" in read:
        factors = read["gpu_slowdown"]
        if not isinstance(factors, Mapping) or not all(str(count).isdigit() for count in factors):
            raise InvalidWorkflow(f"{where}.gpu_slowdown", factors, "a table of factors by number of sharers")
        read["gpu_slowdown"] = Interference({int(count): factor for count, factor in factors.items()})
    return read


def _capacity_document(capacity: Capacity) -> dict[str, Any]:
    document: dict[str, Any] = {
        name: getattr(capacity, name) for name in RESOURCES if getattr(capacity, name) is not None
    }
    if capacity.gpu_devices is not None:
        document["gpu_devices"] = [asdict(device) for device in capacity.gpu_devices]
    if capacity.gpu_slowdown.slowdown:
        document["gpu_slowdown"] = {str(count): factor for count, factor in capacity.gpu_slowdown.slowdown.items()}
    if capacity.pools:
        document["pools"] = {pool: _capacity_document(own) for pool, own in capacity.pools.items()}
    return document


def _stage(entry: Mapping[str, Any], shared: Mapping[str, Any], folder: Path | None) -> Stage:
    if "name" not in entry:
        raise InvalidWorkflow("stage.name", None, "a name")
    name, own = entry["name"], entry.get("menu", {})
    _only(own, _MENU, f"{name}.menu")
    after = [Edge(parent, "all") for parent in _names(entry.get("after", ()), f"{name}.after")]
    after += [Edge(parent, "item") for parent in _names(entry.get("after_items", ()), f"{name}.after_items")]
    rest = {key: value for key, value in entry.items() if key not in ("after", "after_items", "menu")}
    menu = _menu({**_without_rival_sizes(shared, own), **own}, folder)
    return Stage(after=tuple(after), menu=menu, **rest)


def _without_rival_sizes(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The shared menu, less its sizes when the stage's own menu gives sizes in any form."""
    resized = any(key in own for key in _SIZING)
    return {key: value for key, value in shared.items() if not (resized and key in _SIZING)}


def _menu(document: Mapping[str, Any], folder: Path | None) -> Menu:
    prices = _prices(document.get("prices", "local"), folder)
    hardware = text(document.get("hardware", "cpu"), "menu.hardware")
    entries = items(document.get("pools", ("default",)), "menu.pools")
    return Menu(
        prices=prices,
        workers=document.get("workers", (1,)),
        sizes=_sizes(document, prices, hardware),
        pools=tuple(_pool(entry, prices, folder) for entry in entries),
        batch=document.get("batch", (1,)),
        knobs=document.get("knobs", {}),
        by_machine=document.get("by_machine", {}),
    )


def _prices(name: object, folder: Path | None) -> str:
    """The price list's name; a relative path is taken from the folder of the workflow file."""
    name = text(name, "menu.prices")
    beside = folder / name if folder is not None and name.endswith(".toml") else None
    return str(beside) if beside is not None and beside.is_file() else name


def _pool(entry: object, prices: str, folder: Path | None) -> Pool:
    if isinstance(entry, str):
        return Pool(entry)
    pool = _only(entry, _POOL, "menu.pools")
    name = text(pool.get("name"), "menu.pools.name")
    own = _prices(pool["prices"], folder) if "prices" in pool else None
    sized = any(key in pool for key in _SIZING)
    hardware = text(pool.get("hardware", name), "menu.pools.hardware")
    sizes = _sizes(pool, own or prices, hardware) if sized else ()
    return Pool(name, sizes, own, pool.get("workers", ()), pool.get("handing_on"), pool.get("storage"))


def _sizes(document: Mapping[str, Any], prices: str, hardware: str) -> tuple[Size, ...]:
    """Sizes from ``sizes = [{vcpus, memory_mb, gpu}]``, or from ``memory_mb`` or ``vcpus`` where the two are tied."""
    tied = price_list(prices).mb_per_vcpu
    tie = tied or 1024.0
    if "sizes" in document:
        return tuple(_size(table, tied, hardware) for table in _tables(document["sizes"], "menu.sizes", _SIZE))
    memories = [whole(value, "menu.memory_mb") for value in items(document.get("memory_mb", ()), "menu.memory_mb")]
    vcpus = [positive(value, "menu.vcpus") for value in items(document.get("vcpus", ()), "menu.vcpus")]
    if memories and vcpus:
        return tuple(Size(cpu, memory, hardware=hardware) for memory in memories for cpu in vcpus)
    if vcpus:
        return tuple(Size(cpu, max(1, round(cpu * tie)), hardware=hardware) for cpu in vcpus)
    if any(key in document for key in ("memory_mb", "vcpus")) and not memories:
        raise InvalidWorkflow("menu.memory_mb", (), "at least one value")
    return tuple(Size(memory / tie, memory, hardware=hardware) for memory in memories or [round(tie)])


def _size(table: Mapping[str, Any], tied: float | None, hardware: str) -> Size:
    """One size; what a table leaves out follows from the price list's tie, or is one vCPU and 1,024 MB."""
    known = {"hardware": hardware, **table}
    if tied and "memory_mb" not in table and "vcpus" in table:
        known["memory_mb"] = max(1, round(positive(table["vcpus"], "size.vcpus") * tied))
    if tied and "vcpus" not in table and "memory_mb" in table:
        known["vcpus"] = positive(table["memory_mb"], "size.memory_mb") / tied
    return Size(**{"vcpus": 1.0, "memory_mb": 1024, **known})


def _stage_document(stage: Stage) -> dict[str, Any]:
    menu = stage.menu
    document: dict[str, Any] = {"name": stage.name}
    for field_name, kind in (("after", "all"), ("after_items", "item")):
        if parents := [edge.parent for edge in stage.after if edge.kind == kind]:
            document[field_name] = parents
    for name in ("fanout", "items", "probability", "sequential", "opaque"):
        if getattr(stage, name) != Stage.__dataclass_fields__[name].default:
            document[name] = getattr(stage, name)
    document["menu"] = {
        "prices": menu.prices,
        "workers": list(menu.workers),
        "sizes": [_size_document(size) for size in menu.sizes],
        "pools": [_pool_document(pool) for pool in menu.pools],
        "batch": list(menu.batch),
        "knobs": {name: list(values) for name, values in menu.knobs.items()},
    }
    if menu.by_machine:
        document["menu"]["by_machine"] = dict(menu.by_machine)
    return document


def _size_document(size: Size) -> dict[str, Any]:
    """Every field, less the memory of a GPU where none is said."""
    return {name: getattr(size, name) for name in _SIZE if name != "gpu_memory_mb" or size.gpu_memory_mb}


def _pool_document(pool: Pool) -> str | dict[str, Any]:
    if pool == Pool(pool.name):
        return pool.name
    document: dict[str, Any] = {"name": pool.name}
    if pool.sizes:
        document["sizes"] = [_size_document(size) for size in pool.sizes]
    if pool.prices is not None:
        document["prices"] = pool.prices
    if pool.workers:
        document["workers"] = list(pool.workers)
    if pool.handing_on is not None:
        document["handing_on"] = pool.handing_on
    if pool.storage is not None:
        document["storage"] = pool.storage
    return document


def _only(document: object, known: Sequence[str], where: str) -> Mapping[str, Any]:
    if not isinstance(document, Mapping):
        raise InvalidWorkflow(where, document, "a table")
    for key in document:
        if key not in known:
            raise InvalidWorkflow(f"{where}.{key}", document[key], f"one of the fields {', '.join(known)}")
    return document


def _tables(value: object, where: str, known: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
    return tuple(_only(row, known, where) for row in items(value, where))


def _names(value: object, where: str) -> tuple[str, ...]:
    return tuple(text(name, where) for name in items(value, where))

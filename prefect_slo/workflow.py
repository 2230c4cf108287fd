"""The flow as a DAG of stages, with what may be chosen for each.

A workflow is read from ``.toml`` or ``.json``, or learned by the task runner from the futures that a flow passes on.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import networkx as nx

from prefect_slo.errors import InvalidWorkflow, UnknownStage
from prefect_slo.pricing import price_list
from prefect_slo.resources import Capacity, Menu, Option, Pool, Size
from prefect_slo.units import finite, positive, whole

EdgeKind = Literal["all", "item"]


@dataclass(frozen=True)
class Edge:
    """A dependency on a parent stage.

    Attributes:
        parent: Name of the parent.
        kind: ``item`` when item *i* needs only the parent's item *i*; ``all`` when it needs every one.
    """

    parent: str
    kind: EdgeKind = "all"


@dataclass(frozen=True)
class Stage:
    """A Prefect task in its place in the graph.

    Attributes:
        name: Unique in the workflow.
        after: Dependencies.
        menu: What may be chosen for it.
        fanout: ``given`` by the data (workers cap how many of the items run at once) or ``planned`` (a fixed amount
            of work is divided over the workers).
        items: Typical number of items where the fan-out is given; learned from runs.
        probability: Chance that a run executes the stage, given that its parents ran.
        sequential: Calls depend on one another (``x = t.submit(x)`` in a loop): one worker at a time.
        opaque: A direct call or subflow: observed, not sized.
    """

    name: str
    after: tuple[Edge, ...] = ()
    menu: Menu = field(default_factory=Menu)
    fanout: Literal["given", "planned"] = "planned"
    items: int | None = None
    probability: float = 1.0
    sequential: bool = False
    opaque: bool = False

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise InvalidWorkflow("stage.name", self.name, "a non-empty name")
        if not 0 < finite(self.probability, f"{self.name}.probability") <= 1:
            raise InvalidWorkflow(f"{self.name}.probability", self.probability, "a number in (0, 1]")
        if self.fanout not in ("given", "planned"):
            raise InvalidWorkflow(f"{self.name}.fanout", self.fanout, "'given' or 'planned'")
        if self.items is not None:
            whole(self.items, f"{self.name}.items", least=0)

    @property
    def parents(self) -> tuple[str, ...]:
        return tuple(edge.parent for edge in self.after)


_CONSTRAINT = re.compile(
    r"\s*(?P<left>.+)\.(?P<what>workers|memory_mb|vcpus|batch)\s*(?P<op><=|>=|==|=)\s*(?:(?P<number>[0-9.]+)|(?P<right>.+)\.(?P<same>\w+))\s*"
)


@dataclass(frozen=True)
class Constraint:
    """A relation between the choices of two stages, or of a stage and a number: ``merge.workers <= train.workers``."""

    left: str
    what: str
    op: Literal["<=", ">=", "=="]
    right: str | float

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """Read ``<stage>.<workers|memory_mb|vcpus|batch> <= | >= | == <stage>.<same> | <number>``.

        Raises:
            InvalidWorkflow: Text of another form.
        """
        match = _CONSTRAINT.fullmatch(text) if isinstance(text, str) else None
        if match is None or (match["same"] is not None and match["same"] != match["what"]):
            raise InvalidWorkflow("constraint", text, "a relation such as 'merge.workers <= train.workers'")
        op = "==" if match["op"] == "=" else match["op"]
        right = float(match["number"]) if match["number"] else match["right"]
        return cls(match["left"], match["what"], op, right)  # type: ignore[arg-type]

    @property
    def stages(self) -> tuple[str, ...]:
        return (self.left, self.right) if isinstance(self.right, str) else (self.left,)

    def holds(self, options: Mapping[str, Option]) -> bool:
        """Whether it holds; relations of stages that are not in ``options`` yet are taken to hold."""
        if any(name not in options for name in self.stages):
            return True
        left = getattr(options[self.left], self.what)
        right = getattr(options[self.right], self.what) if isinstance(self.right, str) else self.right
        return bool({"<=": left <= right, ">=": left >= right, "==": left == right}[self.op])

    def __str__(self) -> str:
        right = f"{self.right}.{self.what}" if isinstance(self.right, str) else f"{self.right:g}"
        return f"{self.left}.{self.what} {self.op} {right}"


@dataclass(frozen=True)
class Workflow:
    """A DAG of stages.

    Raises:
        InvalidWorkflow: Duplicate names, an edge to a stage that does not exist, a cycle.
    """

    name: str
    stages: tuple[Stage, ...]
    constraints: tuple[Constraint, ...] = ()
    capacity: Capacity = Capacity()

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names:
            raise InvalidWorkflow("stages", (), "at least one stage")
        for name in names:
            if names.count(name) > 1:
                raise InvalidWorkflow("stages", name, "a name that no other stage has")
        for stage in self.stages:
            for edge in stage.after:
                if edge.parent not in names:
                    raise InvalidWorkflow(f"{stage.name}.after", edge.parent, f"one of {', '.join(names)}")
                if edge.kind not in ("all", "item"):
                    raise InvalidWorkflow(f"{stage.name}.after.{edge.parent}", edge.kind, "'all' or 'item'")
        for constraint in self.constraints:
            for name in constraint.stages:
                if name not in names:
                    raise InvalidWorkflow("constraint", str(constraint), f"stages among {', '.join(names)}")
        if not nx.is_directed_acyclic_graph(self.graph):
            cycle = [edge[0] for edge in nx.find_cycle(self.graph)]
            raise InvalidWorkflow("stages", " -> ".join([*cycle, cycle[0]]), "a graph without cycles")

    @cached_property
    def graph(self) -> nx.DiGraph:
        """Stages as nodes, dependencies as edges with attribute ``kind``."""
        graph = nx.DiGraph()
        graph.add_nodes_from(stage.name for stage in self.stages)
        graph.add_edges_from((e.parent, s.name, {"kind": e.kind}) for s in self.stages for e in s.after)
        return graph

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Stage names, parents first; ties by position, so that it doesn't depend on names."""
        position = {stage.name: i for i, stage in enumerate(self.stages)}
        return tuple(nx.lexicographical_topological_sort(self.graph, key=position.__getitem__))

    def __getitem__(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise UnknownStage(name, tuple(stage.name for stage in self.stages))

    def __contains__(self, name: object) -> bool:
        return any(stage.name == name for stage in self.stages)

    def children(self, name: str) -> tuple[str, ...]:
        return tuple(self.graph.successors(self[name].name))

    def pin(self, stage: str, **choices: object) -> Workflow:
        """A copy in which some of a stage's choices are fixed, e.g. ``workflow.pin("train", workers=8)``."""
        pinned = replace(self[stage], menu=self[stage].menu.pinned(**choices))
        return replace(self, stages=tuple(pinned if s.name == stage else s for s in self.stages))

    @classmethod
    def load(cls, path: str | Path) -> Workflow:
        """Read a workflow file, ``.toml`` or ``.json``.

        Raises:
            InvalidWorkflow: The file is missing, is not what its suffix says, or describes no valid workflow.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except (OSError, ValueError) as error:
            raise InvalidWorkflow("workflow", str(path), f"a readable .toml or .json file ({error})") from None
        return cls.from_document(document)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Workflow:
        """A workflow from a parsed document; see ``docs/reference/files.md`` for its fields.

        Raises:
            InvalidWorkflow: Unknown or missing fields, or values outside what they may hold.
        """
        known = ("name", "menu", "stages", "constraints", "capacity", "schema")
        _only(document, known, "workflow")
        shared = document.get("menu", {})
        stages = tuple(_stage(entry, shared) for entry in _tables(document.get("stages"), "stages"))
        capacity = document.get("capacity", {})
        _only(capacity, ("vcpus", "memory_mb", "workers", "gpu"), "capacity")
        return cls(
            name=str(document.get("name", "workflow")),
            stages=stages,
            constraints=tuple(Constraint.parse(text) for text in document.get("constraints", ())),
            capacity=Capacity(**capacity),
        )

    def to_document(self) -> dict[str, Any]:
        """The document that ``from_document`` reads back to an equal workflow."""
        document: dict[str, Any] = {"name": self.name, "stages": [_stage_document(s) for s in self.stages]}
        if self.constraints:
            document["constraints"] = [str(constraint) for constraint in self.constraints]
        limits = {n: getattr(self.capacity, n) for n in ("vcpus", "memory_mb", "workers", "gpu")}
        if any(value is not None for value in limits.values()):
            document["capacity"] = {name: value for name, value in limits.items() if value is not None}
        return document


def chain(*names: str, menu: Menu | None = None, kind: EdgeKind = "all") -> tuple[Stage, ...]:
    """Stages one after another, for tests and examples."""
    first = Stage(names[0], menu=menu or Menu())
    return (first, *(Stage(b, (Edge(a, kind),), menu=menu or Menu()) for a, b in pairwise(names)))


_STAGE_FIELDS = (
    "name",
    "after",
    "after_items",
    "menu",
    "fanout",
    "items",
    "probability",
    "sequential",
    "opaque",
)
_MENU_FIELDS = ("prices", "workers", "memory_mb", "vcpus", "sizes", "pools", "batch", "knobs", "hardware")


def _stage(entry: Mapping[str, Any], shared: Mapping[str, Any]) -> Stage:
    _only(entry, _STAGE_FIELDS, "stage")
    if "name" not in entry:
        raise InvalidWorkflow("stage.name", None, "a name")
    after = [Edge(parent, "all") for parent in _strings(entry.get("after", ()), "after")]
    after += [Edge(parent, "item") for parent in _strings(entry.get("after_items", ()), "after_items")]
    if len({edge.parent for edge in after}) < len(after):
        raise InvalidWorkflow(f"{entry['name']}.after", [e.parent for e in after], "each parent once")
    own = entry.get("menu", {})
    if not isinstance(own, Mapping):
        raise InvalidWorkflow(f"{entry['name']}.menu", own, "a table")
    merged = {**_without_rival_sizes(shared, own), **own}
    rest = {k: v for k, v in entry.items() if k not in ("after", "after_items", "menu")}
    return Stage(after=tuple(after), menu=_menu(merged), **rest)


def _without_rival_sizes(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The shared menu, less its sizes when the stage's own menu gives sizes in another form."""
    sizing = ("memory_mb", "vcpus", "sizes")
    return {k: v for k, v in shared.items() if not (k in sizing and any(s in own for s in sizing))}


def _menu(document: Mapping[str, Any]) -> Menu:
    _only(document, _MENU_FIELDS, "menu")
    prices = str(document.get("prices", "local"))
    hardware = str(document.get("hardware", "cpu"))
    knobs = document.get("knobs", {})
    if not isinstance(knobs, Mapping):
        raise InvalidWorkflow("menu.knobs", knobs, "a table of lists")
    return Menu(
        prices=prices,
        workers=tuple(_list(document.get("workers", (1,)), "menu.workers")),
        sizes=_sizes(document, prices, hardware),
        pools=tuple(_pool(entry, prices) for entry in _list(document.get("pools", ("default",)), "menu.pools")),
        batch=tuple(_list(document.get("batch", (1,)), "menu.batch")),
        knobs={name: tuple(_list(values, f"menu.knobs.{name}")) for name, values in knobs.items()},
    )


def _pool(entry: str | Mapping[str, Any], prices: str) -> Pool:
    if isinstance(entry, str):
        return Pool(entry)
    _only(entry, ("name", "prices", "memory_mb", "vcpus", "sizes", "hardware"), "menu.pools")
    own = str(entry["prices"]) if "prices" in entry else None
    sized = any(key in entry for key in ("memory_mb", "vcpus", "sizes"))
    hardware = str(entry.get("hardware", entry.get("name", "cpu")))
    return Pool(str(entry.get("name", "")), _sizes(entry, own or prices, hardware) if sized else (), own)


def _sizes(document: Mapping[str, Any], prices: str, hardware: str) -> tuple[Size, ...]:
    """Sizes from ``sizes = [{vcpus, memory_mb, gpu}]``, or from ``memory_mb`` or ``vcpus`` where the two are tied."""
    if "sizes" in document:
        tables = _tables(document["sizes"], "menu.sizes")
        for table in tables:
            _only(table, ("vcpus", "memory_mb", "gpu", "hardware"), "menu.sizes")
        return tuple(Size(**{"hardware": hardware, "vcpus": 1.0, "memory_mb": 1024, **table}) for table in tables)
    tie = price_list(prices).mb_per_vcpu or 1024.0
    memories = [positive(value, "menu.memory_mb") for value in _list(document.get("memory_mb", ()), "menu.memory_mb")]
    vcpus = [positive(value, "menu.vcpus") for value in _list(document.get("vcpus", ()), "menu.vcpus")]
    if memories and vcpus:
        return tuple(Size(cpu, int(memory), hardware=hardware) for memory in memories for cpu in vcpus)
    if vcpus:
        return tuple(Size(cpu, max(1, round(cpu * tie)), hardware=hardware) for cpu in vcpus)
    return tuple(Size(memory / tie, int(memory), hardware=hardware) for memory in memories or [tie])


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
    return document


def _size_document(size: Size) -> dict[str, Any]:
    return {"vcpus": size.vcpus, "memory_mb": size.memory_mb, "gpu": size.gpu, "hardware": size.hardware}


def _pool_document(pool: Pool) -> str | dict[str, Any]:
    if not pool.sizes and pool.prices is None:
        return pool.name
    document: dict[str, Any] = {"name": pool.name}
    if pool.sizes:
        document["sizes"] = [_size_document(size) for size in pool.sizes]
    if pool.prices is not None:
        document["prices"] = pool.prices
    return document


def _only(document: object, known: Sequence[str], where: str) -> None:
    if not isinstance(document, Mapping):
        raise InvalidWorkflow(where, document, "a table")
    for key in document:
        if key not in known:
            raise InvalidWorkflow(f"{where}.{key}", document[key], f"one of the fields {', '.join(known)}")


def _list(value: object, where: str) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise InvalidWorkflow(where, value, "a list")
    return value


def _tables(value: object, where: str) -> Sequence[Mapping[str, Any]]:
    rows = _list(value, where)
    for row in rows:
        if not isinstance(row, Mapping):
            raise InvalidWorkflow(where, row, "a list of tables")
    return rows


def _strings(value: object, where: str) -> Sequence[str]:
    rows = _list(value, where)
    for row in rows:
        if not isinstance(row, str):
            raise InvalidWorkflow(where, row, "a list of stage names")
    return rows

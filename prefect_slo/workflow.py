"""The flow as a DAG of stages, with what may be chosen for each.

A workflow is read from ``.toml`` or ``.json``, or learned by the task runner from the futures that a flow passes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefect_slo.constraint import Constraint as Constraint
from prefect_slo.errors import InvalidWorkflow, UnknownStage
from prefect_slo.resources import Capacity, Menu
from prefect_slo.units import finite, instances, text, whole

if TYPE_CHECKING:
    import networkx as nx

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
        after: Dependencies, those on every item first.
        menu: What may be chosen for it.
        fanout: ``given`` by the data (workers cap how many of the items run at once) or ``planned`` (a fixed amount
            of work is divided over the workers).
        items: Typical number of items where the fan-out is given; learned from runs.
        probability: Chance that a run executes the stage, given that its parents ran.
        sequential: Calls depend on one another (``x = t.submit(x)`` in a loop): one worker at a time.
        opaque: A direct call or subflow: observed, not sized.

    Raises:
        InvalidValue: A field of another type, or outside what it may hold.
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
        if not isinstance(self.name, str) or not self.name.strip():
            raise InvalidWorkflow("stage.name", self.name, "a non-empty name")
        object.__setattr__(self, "after", instances(Edge, self.after, f"{self.name}.after"))
        for edge in self.after:
            text(edge.parent, f"{self.name}.after")
            if edge.kind not in ("all", "item"):
                raise InvalidWorkflow(f"{self.name}.after.{edge.parent}", edge.kind, "'all' or 'item'")
        object.__setattr__(self, "after", tuple(sorted(self.after, key=lambda edge: edge.kind)))
        if len(set(self.parents)) < len(self.after):
            raise InvalidWorkflow(f"{self.name}.after", self.parents, "each parent once")
        if not isinstance(self.menu, Menu):
            raise InvalidWorkflow(f"{self.name}.menu", self.menu, "Menu(...)")
        if self.fanout not in ("given", "planned"):
            raise InvalidWorkflow(f"{self.name}.fanout", self.fanout, "'given' or 'planned'")
        if self.items is not None:
            object.__setattr__(self, "items", whole(self.items, f"{self.name}.items", least=0))
        if not 0 < finite(self.probability, f"{self.name}.probability") <= 1:
            raise InvalidWorkflow(f"{self.name}.probability", self.probability, "a number in (0, 1]")
        object.__setattr__(self, "probability", float(self.probability))
        for name in ("sequential", "opaque"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidWorkflow(f"{self.name}.{name}", getattr(self, name), "true or false")

    @property
    def parents(self) -> tuple[str, ...]:
        return tuple(edge.parent for edge in self.after)


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
        text(self.name, "workflow.name")
        object.__setattr__(self, "stages", instances(Stage, self.stages, "stages"))
        object.__setattr__(self, "constraints", instances(Constraint, self.constraints, "constraints"))
        if not isinstance(self.capacity, Capacity):
            raise InvalidWorkflow("capacity", self.capacity, "Capacity(...)")
        if not self.stages:
            raise InvalidWorkflow("stages", (), "at least one stage")
        self._check_names()
        import networkx as nx

        if not nx.is_directed_acyclic_graph(self.graph):
            cycle = [edge[0] for edge in nx.find_cycle(self.graph)]
            raise InvalidWorkflow("stages", " -> ".join([*cycle, cycle[0]]), "a graph without cycles")

    def _check_names(self) -> None:
        names: dict[str, None] = {}
        for stage in self.stages:
            if stage.name in names:
                raise InvalidWorkflow("stages", stage.name, "a name that no other stage has")
            names[stage.name] = None
        for stage in self.stages:
            for parent in stage.parents:
                if parent not in names:
                    raise InvalidWorkflow(f"{stage.name}.after", parent, f"one of {', '.join(names)}")
        for constraint in self.constraints:
            if any(name not in names for name in constraint.stages):
                raise InvalidWorkflow("constraint", str(constraint), f"stages among {', '.join(names)}")

    @cached_property
    def graph(self) -> nx.DiGraph:
        """Stages as nodes, dependencies as edges with attribute ``kind``."""
        import networkx as nx

        graph = nx.DiGraph()
        graph.add_nodes_from(stage.name for stage in self.stages)
        graph.add_edges_from((e.parent, s.name, {"kind": e.kind}) for s in self.stages for e in s.after)
        return graph

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Stage names, parents first; ties by position, so that it doesn't depend on names."""
        import networkx as nx

        position = {stage.name: i for i, stage in enumerate(self.stages)}
        return tuple(nx.lexicographical_topological_sort(self.graph, key=position.__getitem__))

    @cached_property
    def _by_name(self) -> dict[str, Stage]:
        return {stage.name: stage for stage in self.stages}

    def __getitem__(self, name: str) -> Stage:
        if name in self:
            return self._by_name[name]
        raise UnknownStage(name, tuple(self._by_name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._by_name

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
        from prefect_slo import workflow_document

        return workflow_document.load(path)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Workflow:
        """A workflow from a parsed document; see ``docs/reference/files.md`` for its fields.

        Raises:
            InvalidValue: Unknown or missing fields, or values outside what they may hold.
        """
        from prefect_slo import workflow_document

        return workflow_document.read(document)

    def to_document(self) -> dict[str, Any]:
        """The document that ``from_document`` reads back to an equal workflow."""
        from prefect_slo import workflow_document

        return workflow_document.write(self)


def chain(*names: str, menu: Menu | None = None, kind: EdgeKind = "all") -> tuple[Stage, ...]:
    """Stages one after another, for tests and examples."""
    first = Stage(names[0], menu=menu or Menu())
    return (first, *(Stage(b, (Edge(a, kind),), menu=menu or Menu()) for a, b in pairwise(names)))

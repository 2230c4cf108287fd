"""Learns the stage graph of a flow from what it submits.

A stage is a task in its place: its task key without the code hash, and the set of its parent stages. Calls of the same
task with the same parents are items of one stage; the same task with other parents is another stage, numbered in the
order of appearance. ``x = t.submit(x)`` in a loop is one stage, flagged sequential.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from prefect import Task

from prefect_slo.workflow import Edge, EdgeKind, Stage, Workflow


@dataclass
class _Seen:
    """A stage as far as this run has shown it."""

    name: str
    key: str
    source: str
    parents: frozenset[str]
    items: int = 0
    sequential: bool = False
    upstream: Counter[str] = field(default_factory=Counter)
    single: dict[str, set[UUID]] = field(default_factory=dict)
    several: set[str] = field(default_factory=set)


class StageGraph:
    """Places calls in stages, and tells what the flow looks like so far."""

    def __init__(self) -> None:
        self._stages: dict[str, _Seen] = {}
        self._by_place: dict[tuple[str, frozenset[str]], _Seen] = {}
        self._names: Counter[str] = Counter()
        self._stage_of: dict[UUID, str] = {}

    def place(self, task: Task[Any, Any], task_run_id: UUID, upstream: Iterable[UUID]) -> str:
        """The stage that a call belongs to, given the task runs whose results it takes."""
        key, source = split_key(task.task_key)
        upstream = set(upstream)
        parents = frozenset(self._stage_of[run] for run in upstream if run in self._stage_of)
        seen = self._by_place.get((key, parents)) or self._in_loop(key, parents)
        if seen is None:
            name = self._name(task.name)
            seen = self._stages[name] = _Seen(name, key, source, parents)
            self._by_place[key, parents] = seen
        seen.items += 1
        self._stage_of[task_run_id] = seen.name
        self._note_edges(seen, upstream)
        return seen.name

    def stage_of(self, task_run_id: UUID) -> str | None:
        """The stage of a call; ``None`` for task runs that weren't submitted here."""
        return self._stage_of.get(task_run_id)

    def key_of(self, stage: str) -> tuple[str, str]:
        """A stage's task key (without code hash) and the hash of its code: what its model is stored under."""
        seen = self._stages[stage]
        return seen.key, seen.source

    def __contains__(self, stage: object) -> bool:
        return stage in self._stages

    @property
    def stages(self) -> tuple[str, ...]:
        """Names, in order of appearance."""
        return tuple(self._stages)

    def workflow(self, name: str) -> Workflow | None:
        """The graph so far as a workflow with empty menus; ``None`` before the first call."""
        if not self._stages:
            return None
        return Workflow(name, tuple(self._stage(seen) for seen in self._stages.values()))

    def depth_first(self) -> dict[str, float]:
        """A priority for every stage: how many stages lead to it, so that branches are finished before begun."""
        depth: dict[str, float] = {}
        for name, seen in self._stages.items():  # parents appear before children
            depth[name] = 1 + max((depth.get(parent, 0) for parent in seen.parents if parent != name), default=0)
        return depth

    def _in_loop(self, key: str, parents: frozenset[str]) -> _Seen | None:
        """The stage of the same task among the parents, when the rest of the parents are that stage's own."""
        for parent in parents:
            seen = self._stages[parent]
            if seen.key == key and parents - {parent} <= seen.parents:
                seen.sequential = True
                self._by_place[key, parents] = seen
                return seen
        return None

    def _note_edges(self, seen: _Seen, upstream: set[UUID]) -> None:
        by_stage: dict[str, list[UUID]] = {}
        for run in upstream:
            if (parent := self._stage_of.get(run)) is not None and parent != seen.name:
                by_stage.setdefault(parent, []).append(run)
        for parent, runs in by_stage.items():
            taken = seen.single.setdefault(parent, set())
            if len(runs) > 1 or runs[0] in taken:
                seen.several.add(parent)
            taken.update(runs)

    def _kind(self, seen: _Seen, parent: str) -> EdgeKind:
        """``item`` where every item took exactly one of the parent's items, and no two took the same."""
        one_to_one = parent not in seen.several and seen.items > 1
        return "item" if one_to_one and len(seen.single.get(parent, ())) == seen.items else "all"

    def _stage(self, seen: _Seen) -> Stage:
        edges = tuple(Edge(p, self._kind(seen, p)) for p in self._stages if p in seen.parents and p != seen.name)
        return Stage(seen.name, edges, fanout="given", items=seen.items, sequential=seen.sequential)

    def _name(self, task_name: str) -> str:
        self._names[task_name] += 1
        n = self._names[task_name]
        return task_name if n == 1 else f"{task_name}-{n}"


def split_key(task_key: str) -> tuple[str, str]:
    """A Prefect task key as (key without code hash, code hash): ``f-1a2b3c4d`` is ``("f", "1a2b3c4d")``."""
    key, _, source = task_key.rpartition("-")
    return (key, source) if key else (task_key, "")

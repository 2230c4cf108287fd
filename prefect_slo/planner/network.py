r"""The expanded graph whose longest path is a run.

Stage *i* has a start :math:`S_i`, a hand-over :math:`H_i` (its first items done) and an end :math:`E_i`, with arcs

    S_i → E_i  (its latency)      S_i → H_i  (one wave)          E_p → S_i  (``all`` edge, 0)
    H_p → S_i  (``item`` edge, 0)  E_p → E_i  (``item`` edge, one wave of i)

It says the same as ``models.makespan``, in a form on which a flow, and so a linear bound, can be written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.problem import CompiledStage

Floats = NDArray[np.floating]
Picked = NDArray[np.integer] | None
ArcKind = Literal["source", "full", "piece", "all", "handover", "tail", "sink"]


class Arc(NamedTuple):
    """An arc of the expanded graph: ``kind`` says which, ``tail`` and ``head`` are stage positions (-1: none)."""

    kind: ArcKind
    tail: int
    head: int


@dataclass(frozen=True, eq=False)
class Network:
    """The expanded graph of a problem.

    Attributes:
        arcs: In topological order of their heads.
    """

    arcs: tuple[Arc, ...]
    n_stages: int

    @classmethod
    def of(cls, stages: tuple[CompiledStage, ...]) -> Network:
        """Arcs of stages in topological order."""
        arcs: list[Arc] = []
        parents = {p for stage in stages for p, _ in stage.parents}
        handing = {p for stage in stages for p, kind in stage.parents if kind == "item"}
        for i, stage in enumerate(stages):
            if not stage.parents:
                arcs.append(Arc("source", -1, i))
            arcs += [Arc("handover" if kind == "item" else "all", p, i) for p, kind in stage.parents]
            arcs.append(Arc("full", i, i))
            arcs += [Arc("tail", p, i) for p, kind in stage.parents if kind == "item"]
            if i in handing:
                arcs.append(Arc("piece", i, i))
        arcs += [Arc("sink", i, -1) for i in range(len(stages)) if i not in parents]
        return cls(tuple(arcs), len(stages))

    @cached_property
    def into(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        """By stage: arcs that end at its start (``start``), and item tails that end at its end (``tail``)."""
        return tuple(
            {
                "start": tuple(
                    a for a, arc in enumerate(self.arcs) if arc.head == i and arc.kind in ("source", "all", "handover")
                ),
                "tail": tuple(a for a, arc in enumerate(self.arcs) if arc.head == i and arc.kind == "tail"),
                "full": tuple(a for a, arc in enumerate(self.arcs) if arc.head == i and arc.kind == "full"),
                "piece": tuple(a for a, arc in enumerate(self.arcs) if arc.head == i and arc.kind == "piece"),
            }
            for i in range(self.n_stages)
        )

    def longest(self, latency: list[Floats], piece: list[Floats]) -> tuple[Floats, NDArray[np.bool_]]:
        """Longest path under given stage times, and which arcs lie on it.

        Args:
            latency: By stage, ``(n_columns,)``.
            piece: One wave of it.

        Returns:
            Lengths ``(n_columns,)`` and arcs ``(n_arcs, n_columns)``.
        """
        shape = np.shape(latency[0])
        end: list[Floats] = []
        handover: list[Floats] = []
        by: list[tuple[Picked, Picked]] = []
        for i in range(self.n_stages):
            into = self.into[i]
            start, at_start = _largest([self._value(a, end, handover, shape) for a in into["start"]])
            finish, at_end = _largest([start + latency[i], *(end[self.arcs[a].tail] + piece[i] for a in into["tail"])])
            by.append((at_start, at_end))
            end.append(finish)
            handover.append(start + piece[i] if into["piece"] else start)
        sinks = [a for a, arc in enumerate(self.arcs) if arc.kind == "sink"]
        length, last = _largest([end[self.arcs[a].tail] for a in sinks])
        return length, self._trace(by, sinks, last, shape)

    def _value(self, a: int, end: list[Floats], handover: list[Floats], shape: tuple[int, ...]) -> Floats:
        arc = self.arcs[a]
        if arc.kind == "source":
            return np.zeros(shape, dtype=np.float32)
        return handover[arc.tail] if arc.kind == "handover" else end[arc.tail]

    def _trace(
        self, by: list[tuple[Picked, Picked]], sinks: list[int], last: Picked, shape: tuple[int, ...]
    ) -> NDArray[np.bool_]:
        on = np.zeros((len(self.arcs), *shape), dtype=bool)
        at_end = np.zeros((self.n_stages, *shape), dtype=bool)
        at_handover = np.zeros((self.n_stages, *shape), dtype=bool)
        for position, a in enumerate(sinks):
            on[a] = True if last is None else last == position
            at_end[self.arcs[a].tail] |= on[a]
        for i in reversed(range(self.n_stages)):
            into, (from_start, from_end) = self.into[i], by[i]
            full = into["full"][0]
            on[full] = at_end[i] if from_end is None else at_end[i] & (from_end == 0)
            for position, a in enumerate(into["tail"], start=1):
                on[a] = at_end[i] & (from_end == position)
                at_end[self.arcs[a].tail] |= on[a]
            for a in into["piece"]:
                on[a] = at_handover[i]
            started = on[full] | at_handover[i] if into["piece"] else on[full]
            for position, a in enumerate(into["start"]):
                on[a] = started if from_start is None else started & (from_start == position)
                arc = self.arcs[a]
                if arc.kind == "all":
                    at_end[arc.tail] |= on[a]
                elif arc.kind == "handover":
                    at_handover[arc.tail] |= on[a]
        return on


def _largest(values: list[Floats]) -> tuple[Floats, Picked]:
    """Largest of some arrays, and which it is; ``None`` where there is but one."""
    if len(values) == 1:
        return values[0], None
    if len(values) == 2:
        return np.maximum(*values), (values[1] > values[0]).view(np.int8)
    return np.maximum.reduce(values), np.argmax(values, axis=0)

r"""Least contribution of the stages still to be chosen, by dynamic programming over upstream workers.

At depth *k* of a topological order the stages *k, k+1, …* are open. What they contribute at least depends on the
choices made before only through the worker counts of the stages that they read from (their *frontier*), so

    V_k(w_frontier) = min_{w_k} [ min_{o : workers(o) = w_k} h_k(u(w_frontier), o) + V_{k+1}(w_frontier') ]

is exact for chains and for every graph with a narrow frontier. A frontier with more than ``STATES`` combinations
forgets stages and takes the least over what it forgot: still a lower bound (mini-buckets; Dechter and Rish, J. ACM
50(2), 2003).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.problem import Problem

Floats = NDArray[np.floating]

STATES = 32
"""Most combinations of frontier worker counts that are told apart; each costs one row of the table per scenario."""


@dataclass(frozen=True, eq=False)
class Suffix:
    """Lower bounds on what open stages contribute.

    Attributes:
        problem: What they belong to.
        frontier: By depth, the stages whose worker counts the table tells apart.
        tables: By depth ``0 … n_stages``, shape ``(n_classes of each frontier stage …, n_columns)``.
    """

    problem: Problem
    frontier: tuple[tuple[int, ...], ...]
    tables: tuple[Floats, ...]

    @classmethod
    def of(cls, problem: Problem, contribution: Callable[[int], Floats]) -> Suffix:
        """Tables for a contribution per stage, a function of its position: ``(n_upstream, n_options, n_columns)``."""
        n = len(problem.stages)
        frontier = _frontiers(problem)
        tables: list[Floats] = [np.zeros(1, dtype=np.float32)]
        for k in reversed(range(n)):
            tables.append(_step(problem, k, contribution(k), frontier[k], frontier[k + 1], tables[-1]))
        return cls(problem, frontier, tuple(reversed(tables)))

    def rest(self, depth: int, choice: Sequence[int]) -> Floats:
        """Least contribution of stages ``depth …`` after ``choice``, ``(n_columns,)``."""
        stages = self.problem.stages
        return np.asarray(self.tables[depth][tuple(stages[f].class_of[choice[f]] for f in self.frontier[depth])])

    def rest_by_class(self, depth: int, choice: Sequence[int]) -> Floats:
        """The same when stage ``depth − 1`` is open: by its worker class, ``(n_classes or 1, n_columns)``."""
        stages, last = self.problem.stages, depth - 1
        index = tuple(
            slice(None) if f == last else stages[f].class_of[choice[f]] for f in self.frontier[depth]
        )  # fmt: skip
        table = np.asarray(self.tables[depth][index])
        return table if last in self.frontier[depth] else table[None]


def _frontiers(problem: Problem) -> tuple[tuple[int, ...], ...]:
    stages = problem.stages
    read_until = [max((j for j, s in enumerate(stages) if s.upstream and i in dict(s.parents)), default=-1)
                  for i in range(len(stages))]  # fmt: skip
    kept: list[tuple[int, ...]] = [()]
    for k in range(1, len(stages) + 1):
        alive = [i for i in (*kept[-1], k - 1) if read_until[i] >= k]
        while prod(len(stages[i].classes) for i in alive) > STATES:
            alive.pop(max(range(len(alive)), key=lambda at: read_until[alive[at]]))
        kept.append(tuple(alive))
    return tuple(kept)


def _step(
    problem: Problem, k: int, value: Floats, before: tuple[int, ...], after: tuple[int, ...], rest: Floats
) -> Floats:
    stages, stage = problem.stages, problem.stages[k]
    by_class = _least_by_class(value, stage.class_of, problem.allowed[k], len(stage.classes))
    if k not in after:
        by_class = by_class.min(axis=1, keepdims=True)
    shape = tuple(len(stages[f].classes) for f in before)
    table = np.empty((*shape, value.shape[-1]), dtype=value.dtype)
    for state in product(*(range(size) for size in shape)):
        known = dict(zip(before, state, strict=True))
        rows = _rows(problem, k, known)
        own = by_class[rows[0]] if len(rows) == 1 else by_class[list(rows)].min(axis=0)
        index = tuple(slice(None) if f == k else known[f] for f in after)
        table[state] = (own + rest[index]).min(axis=0)
    return table


def _least_by_class(value: Floats, class_of: NDArray[np.int64], allowed: NDArray[np.bool_], n_classes: int) -> Floats:
    least = np.full((value.shape[0], n_classes, value.shape[2]), np.inf, dtype=value.dtype)
    for c in range(n_classes):
        members = np.flatnonzero((class_of == c) & allowed)
        if members.size:
            least[:, c] = value[:, members].min(axis=1)
    return least


def _rows(problem: Problem, k: int, known: dict[int, int]) -> tuple[int, ...]:
    """Rows of stage ``k``'s table that agree with the known worker classes of its parents."""
    stage, stages = problem.stages[k], problem.stages
    if not stage.upstream:
        return (0,)
    sums = {0}
    for p, _ in stage.parents:
        counts = (stages[p].classes[known[p]],) if p in known else np.unique(stages[p].workers[problem.allowed[p]])
        sums = {total + int(count) for total in sums for count in counts}
    return tuple(sorted(stage.upstream[total] for total in sums))

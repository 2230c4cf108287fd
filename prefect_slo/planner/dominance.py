"""Options that another option of their stage makes needless: never slower, never dearer, no harder to place.

Where *a* dominates *b* in every sample, every plan with *b* has a plan with *a* that is at least as good, so a search
for one best plan may leave *b* out. Where the stages downstream feel the number of workers, *a* must have as many as
*b*, or fewer if more of them never help downstream. On measured profiles about a third of the options go, on random
instances more than half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.problem import Choice, CompiledStage, Goal, Problem

Bools = NDArray[np.bool_]

GLANCE = 12
"""Samples on which pairs are compared before all are."""


@dataclass(frozen=True, eq=False)
class Reduced:
    """A problem without its dominated options, which keeps a best plan of the whole.

    Attributes:
        problem: What is left.
        kept: By stage, positions in the whole problem of the options that are left, ascending.
    """

    problem: Problem
    kept: tuple[NDArray[np.intp], ...]

    @classmethod
    def of(cls, problem: Problem, goal: Goal) -> Reduced:
        """Leave out what is dominated for a goal: with a budget, costs count sample by sample, else on average."""
        kept = tuple(np.flatnonzero(mask) for mask in undominated(problem, goal))
        if not all(len(index) for index in kept):  # nothing is allowed somewhere: nothing to leave out
            return cls(problem, tuple(np.arange(len(stage.options)) for stage in problem.stages))
        rules = {(a, b): matrix[np.ix_(kept[a], kept[b])] for (a, b), matrix in problem.rules.items()}
        stages: list[CompiledStage] = []
        for stage, index in zip(problem.stages, kept, strict=True):
            sums = {sum(c) for c in product(*(stages[p].classes.tolist() for p, _ in stage.parents))}
            stages.append(_restricted(stage, index, sums))
        left = replace(
            problem, stages=tuple(stages), rules=rules, antichains=problem.antichains.restricted(kept),
            allowed=tuple(np.ones(len(index), dtype=bool) for index in kept),
        )  # fmt: skip
        return cls(left, kept)

    def within(self, choice: Sequence[int]) -> Choice | None:
        """A choice of the whole problem in what is left of it; ``None`` where an option of it is gone."""
        found = [np.flatnonzero(index == o) for index, o in zip(self.kept, choice, strict=True)]
        return tuple(int(at[0]) for at in found) if all(len(at) for at in found) else None

    def whole(self, choice: Sequence[int]) -> Choice:
        """A choice of what is left as one of the whole problem."""
        return tuple(int(index[o]) for index, o in zip(self.kept, choice, strict=True))


def undominated(problem: Problem, goal: Goal) -> tuple[Bools, ...]:
    """By stage, the allowed options that no other allowed option dominates, ``(n_options,)``; of equals one is kept."""
    piped = {p for stage in problem.stages for p, kind in stage.parents if kind == "item"}
    costs = goal.cost_bound_usd < inf
    masks = []
    for i, stage in enumerate(problem.stages):
        readers = [s for s in problem.stages if s.upstream and i in dict(s.parents)]
        fits = _placeable(problem, i) & _bearable(stage, readers, costs=costs)
        if i in piped or any(kind == "item" for _, kind in stage.parents):
            fits &= stage.piece[:, None] <= stage.piece
        masks.append(_kept(stage, problem.allowed[i], fits, costs=costs))
    return tuple(masks)


def _placeable(problem: Problem, i: int) -> Bools:
    """``[a, b]``: *a* fits wherever *b* does, by constraints and capacity."""
    fits = problem.antichains.easier(i)
    for (earlier, later), matrix in problem.rules.items():
        if i in (earlier, later):
            own = matrix if i == earlier else matrix.T
            fits &= (own[:, None, :] | ~own[None, :, :]).all(axis=2)
    return np.asarray(fits)


def _bearable(stage: CompiledStage, readers: Sequence[CompiledStage], *, costs: bool) -> Bools:
    """``[a, b]``: no stage downstream is worse off with the workers of *a* than with those of *b*."""
    if not readers:
        return np.ones((len(stage.options),) * 2, dtype=bool)
    if all(_rising(reader, costs=costs) for reader in readers):
        return np.asarray(stage.workers[:, None] <= stage.workers)
    return np.asarray(stage.workers[:, None] == stage.workers)


def _rising(stage: CompiledStage, *, costs: bool) -> bool:
    """Whether more workers upstream never make a stage faster or cheaper."""
    rows = [stage.upstream[u] for u in sorted(stage.upstream)]
    glance = np.linspace(0, stage.latency.shape[2] - 1, GLANCE).astype(int)
    tables = [stage.latency, stage.cost] if costs else [stage.latency]
    every: list[NDArray[Any]] = [stage.mean_cost, *(table[:, :, glance] for table in tables), *tables]
    return all(bool((table[a] <= table[b]).all()) for table in every for a, b in pairwise(rows))


def _kept(stage: CompiledStage, allowed: Bools, fits: Bools, *, costs: bool) -> Bools:
    tables = [stage.latency, stage.cost] if costs else [stage.latency]
    glance = np.linspace(0, stage.latency.shape[2] - 1, GLANCE).astype(int)
    fits = fits & (stage.mean_cost[:, :, None] <= stage.mean_cost[:, None, :]).all(axis=0)
    for table in tables:
        some = table[:, :, glance]
        fits &= (some[:, :, None] <= some[:, None, :]).all(axis=(0, 3))
    kept = allowed.copy()
    for b in np.flatnonzero(allowed)[::-1]:
        rivals = np.flatnonzero(fits[:, b] & kept)
        if any(a != b and all((table[:, a] <= table[:, b]).all() for table in tables) for a in rivals):
            kept[b] = False
    return kept


def _restricted(stage: CompiledStage, options: NDArray[np.intp], sums: set[int]) -> CompiledStage:
    rows = np.array([stage.upstream[u] for u in sorted(sums)] if stage.upstream else [0], dtype=np.intp)
    workers = stage.workers[options]
    classes, class_of = np.unique(workers, return_inverse=True)
    return replace(
        stage,
        options=tuple(stage.options[o] for o in options),
        latency=stage.latency[np.ix_(rows, options)],
        cost=stage.cost[np.ix_(rows, options)],
        mean_cost=stage.mean_cost[np.ix_(rows, options)],
        waves=stage.waves[options],
        piece=stage.piece[options],
        workers=workers,
        classes=classes,
        class_of=class_of,
        upstream={u: at for at, u in enumerate(sorted(sums))} if len(rows) > 1 else {},
    )

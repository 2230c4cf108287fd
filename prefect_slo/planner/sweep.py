"""Plans from cheapest to fastest, by dual ascent on a typical run.

The multipliers of a *typical* scenario under bounds from loose to tight walk the cost/latency trade-off. All bounds
ascend together, as columns, and every plan that a step picks is a candidate, so the same sweep starts the search for
every goal and seeds the Pareto front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from prefect_slo.planner.batch import admitted
from prefect_slo.planner.multipliers import ascend
from prefect_slo.planner.problem import Choice, CompiledStage, Goal, Problem

Floats = NDArray[np.floating]

COLUMNS = 24
"""Bounds in a sweep."""


class Sweeps:
    """Sweeps of one problem, each made once.

    Args:
        problem: What is planned.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._made: dict[tuple[int, ...], list[Choice]] = {}

    def around(self, reference: Choice | None = None) -> list[Choice]:
        """As ``sweep``; references whose stages feed one another alike have one sweep, the first one's."""
        rows = () if reference is None else self._rows(reference)
        if rows not in self._made:
            self._made[rows] = found = sweep(self._problem, reference)
            if reference is None and found:
                self._made.setdefault(self._rows(found[0]), found)
        return self._made[rows]

    def _rows(self, choice: Choice) -> tuple[int, ...]:
        return tuple(self._problem.upstream_row(i, choice) for i in range(len(choice)))


def sweep(problem: Problem, reference: Choice | None = None) -> list[Choice]:
    """Plans from cheapest to fastest, duplicates and those that break structural limits left out.

    Args:
        problem: What is planned.
        reference: A plan that says how many workers feed each stage; the cheapest options by default.
    """
    typical = [stage.latency.mean(axis=2) for stage in problem.stages]
    start = reference or _greedy(problem, [stage.mean_cost for stage in problem.stages])
    if start is None:
        return []
    found: dict[Choice, None] = dict.fromkeys([start])
    for times in ([stage.mean_cost for stage in problem.stages], typical):
        if (plan := _greedy(problem, times)) is not None:
            found[plan] = None
    fastest = _greedy(problem, typical) or start
    rows = [problem.upstream_row(i, start) for i in range(len(problem.stages))]
    slow, fast = (float(problem.latency(plan).mean()) for plan in (start, fastest))
    bounds = np.geomspace(0.9 * min(fast, slow), 1.1 * max(fast, slow), COLUMNS).astype(np.float32)
    flat = replace(
        problem,
        stages=tuple(_flat(stage, times) for stage, times in zip(problem.stages, typical, strict=True)),
        driver=np.float32(problem.driver.mean()) + bounds[0] - bounds,
    )
    picks: list[NDArray[np.intp]] = []
    ascend(flat, Goal(latency_bound_s=float(bounds[0])), rows, picks=picks)
    choices = np.unique(np.concatenate(picks, axis=1).T, axis=0)
    for choice in choices[admitted(problem, choices)]:
        found[tuple(choice.tolist())] = None
    return list(found)


def _greedy(problem: Problem, value: Sequence[Floats]) -> Choice | None:
    """The option of least value for every stage in turn, given those before it; ``None`` when nothing is left."""
    choice: list[int] = []
    for i in range(len(problem.stages)):
        options = np.flatnonzero(problem.open_options(i, choice))
        if not options.size:
            return None
        choice.append(int(options[value[i][problem.upstream_row(i, choice), options].argmin()]))
    return tuple(choice) if problem.admits(choice) else None


def _flat(stage: CompiledStage, typical: Floats) -> CompiledStage:
    """A stage whose every sample is the typical one."""
    shape = (*typical.shape, COLUMNS)
    latency = np.broadcast_to(typical.astype(np.float32)[:, :, None], shape)
    return replace(stage, latency=latency, cost=latency)

"""Which settings a sweep still has to measure: a design over each stage's menu, less what is known already."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefect_slo.observation import StageRuns
from prefect_slo.resources import Option
from prefect_slo.workflow import Stage, Workflow

SETTINGS = 8
"""Settings of a stage that a sweep measures at most: what a posynomial of a handful of terms needs, and some spare."""


LEAST_ROWS = 4
"""Rows of a stage that a sweep measures at least, however small its menu: fewer identify no model."""


@dataclass(frozen=True)
class Design:
    """What is left to measure.

    Attributes:
        todo: Options by stage, each as often as it is still to be run, in random order.
    """

    todo: Mapping[str, tuple[Option, ...]]

    @property
    def runs(self) -> int:
        """Runs that measure all of it: one option of every stage at a time."""
        return max((len(options) for options in self.todo.values()), default=0)

    def setting(self, run: int, fallback: Mapping[str, Option]) -> dict[str, Option]:
        """Options of all stages in a run; stages with nothing left to measure keep ``fallback``."""
        return {
            stage: self.todo[stage][run] if run < len(self.todo.get(stage, ())) else option
            for stage, option in fallback.items()
        }


def design(workflow: Workflow, known: StageRuns | None, *, repeats: int, seed: int, settings: int = SETTINGS) -> Design:
    """What to measure of every stage: each setting of its design ``repeats`` times, less the rows that there are.

    A stage of so few settings that this would leave it with less than ``LEAST_ROWS`` is measured more often. Stages are
    shuffled independently, so that a slow setting of one isn't always met with a slow one of another.

    Args:
        workflow: Stages with menus.
        known: Rows that the models are fitted to already.
        repeats: Rows per setting.
        seed: Of the order.
        settings: Settings per stage at most.
    """
    todo = {}
    for position, stage in enumerate(workflow.stages):
        rng = np.random.default_rng([seed, position])
        have = _rows_by_setting(known, stage.name) if known is not None else Counter()
        options = spread(stage, settings)
        times = max(repeats, math.ceil(LEAST_ROWS / len(options)))
        left = [o for o in options for _ in range(times - have[_setting(o)])]
        todo[stage.name] = tuple(left[i] for i in rng.permutation(len(left)))
    return Design({name: options for name, options in todo.items() if options})


def spread(stage: Stage, settings: int = SETTINGS) -> tuple[Option, ...]:
    """At most so many options of a stage's menu, spread out: the first and the last, then always the farthest.

    Distances are between log workers, log vCPUs, log memory and log batch; another pool or knob is 1 away. This is the
    greedy maximin design (Johnson, Moore & Ylvisaker, 1990).
    """
    options = stage.menu.options()
    if len(options) <= settings:
        return options
    points = np.asarray([_coordinates(option) for option in options])
    points /= np.maximum(np.ptp(points, axis=0), 1e-9)
    chosen = [0, len(options) - 1]
    nearest = np.minimum(_distance(points, 0, options), _distance(points, len(options) - 1, options))
    while len(chosen) < settings:
        farthest = int(np.argmax(nearest))
        chosen.append(farthest)
        nearest = np.minimum(nearest, _distance(points, farthest, options))
    return tuple(options[i] for i in sorted(chosen))


def fallback_options(workflow: Workflow, preferred: Mapping[str, Option]) -> dict[str, Option]:
    """One option per stage: the preferred one where it is on the menu, else the menu's largest."""
    return {
        stage.name: (
            preferred[stage.name]
            if stage.name in preferred and preferred[stage.name] in stage.menu.options()
            else stage.menu.options()[-1]
        )
        for stage in workflow.stages
    }


def _coordinates(option: Option) -> list[float]:
    return [
        math.log(option.workers),
        math.log(option.size.vcpus),
        math.log(option.size.memory_mb),
        math.log(option.batch),
    ]


def _distance(points: NDArray[np.float64], i: int, options: Sequence[Option]) -> NDArray[np.float64]:
    apart = np.sqrt(((points - points[i]) ** 2).sum(axis=1))
    kind = [
        (o.pool, o.size.hardware, o.knobs) != (options[i].pool, options[i].size.hardware, options[i].knobs)
        for o in options
    ]
    return np.asarray(apart + np.asarray(kind, dtype=float))


def _setting(option: Option) -> tuple[object, ...]:
    size = option.size
    return (option.workers, round(size.vcpus, 3), size.hardware, option.batch, option.knobs)


def _rows_by_setting(known: StageRuns, stage: str) -> Counter[tuple[object, ...]]:
    rows = known.of_stage(stage)
    found: Counter[tuple[object, ...]] = Counter()
    for i in range(len(rows)):
        knobs = tuple(sorted((name, column[i]) for name, column in rows.extra.items() if column[i] is not None))
        key = (
            int(rows["workers"][i]),
            round(float(rows["vcpus"][i]), 3),
            str(rows["hardware"][i]),
            int(rows["batch"][i]),
        )
        found[*key, knobs] += 1
        if knobs:
            found[*key, ()] += 1
    return found

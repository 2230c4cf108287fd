"""Which settings a sweep still has to measure: a design over each stage's menu, less what is known already."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefect_slo.observation import StageRuns
from prefect_slo.resources import Capacity, Option
from prefect_slo.runner.pools import THREAD
from prefect_slo.workflow import Stage, Workflow

SETTINGS = 8
"""Settings of a stage that a sweep measures at most: what a posynomial of a handful of terms needs, and some spare."""


ON_THREADS = 2
"""Settings on threads that it measures besides, where a stage may run on either: the fewest and the most of them tell
whether its code gives up the interpreter's lock."""

LEAST_ROWS = 4
"""Rows of a stage that a sweep measures at least, however small its menu: fewer identify no model."""

UNLIMITED = Capacity()


STEADY = 0.05
"""Run-to-run noise that two repeats of a setting are enough for. What is not known of a time after n runs goes with
noise²/n, so that twice the noise takes four times the repeats."""


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
        have = _rows_by_setting(known, stage) if known is not None else Counter()
        options = spread(stage, settings, workflow.capacity)
        own = [option for option in options if option.pool != THREAD] or options
        least = math.ceil(LEAST_ROWS / len(own))
        times = {option: max(repeats, least) if option in own else repeats for option in options}
        left = [o for o in options for _ in range(times[o] - have[_setting(o)])]
        todo[stage.name] = tuple(left[i] for i in rng.permutation(len(left)))
    return Design({name: options for name, options in todo.items() if options})


def wanted_repeats(workflow: Workflow, known: StageRuns | None, *, repeats: int, most: int) -> int:
    """Repeats of every setting that the noise measured so far calls for, from ``repeats`` to ``most``."""
    if known is None or most <= repeats:
        return repeats
    return min(max(repeats, math.ceil(repeats * (noise_of(workflow, known) / STEADY) ** 2)), most)


def noise_of(workflow: Workflow, known: StageRuns) -> float:
    """Standard deviation of log wall times among runs of one setting, stages counting by their share of the time.

    A setting is that of the menu, knobs included, and the number of items.

    0 where no setting was run twice. Runs that had to start workers are left out.
    """
    shares, noises = [], []
    for name in np.unique(known["stage"].astype(str)).tolist():
        rows = known.of_stage(name)
        rows = rows.select(~rows["cold"].astype(bool)) if not rows["cold"].all() else rows
        logs = np.log(np.maximum(rows["wall_s"].astype(float), 1e-9))
        columns = [rows[c].astype(str) for c in ("workers", "vcpus", "hardware", "batch", "items")]
        columns += [rows.extra[knob].astype(str) for knob in _knobs(workflow, name) if knob in rows.extra]
        keys = np.array(["|".join(key) for key in zip(*columns, strict=True)])
        _, which, counts = np.unique(keys, return_inverse=True, return_counts=True)
        means = np.bincount(which, logs) / counts
        freedom = int(np.sum(counts - 1))
        shares.append(float(np.exp(logs.mean())))
        noises.append(math.sqrt(float(np.sum((logs - means[which]) ** 2)) / freedom) if freedom else 0.0)
    return float(np.average(noises, weights=shares)) if shares else 0.0


def spread(stage: Stage, settings: int = SETTINGS, capacity: Capacity = UNLIMITED) -> tuple[Option, ...]:
    """At most so many options of a stage's menu, spread out, and at most ``ON_THREADS`` more on threads.

    Those whose shares of GPUs have no place here are left out: they would be measured on fewer workers than they say.
    """
    options = _placeable(stage, capacity)
    threads = tuple(option for option in options if option.pool == THREAD)
    others = tuple(option for option in options if option.pool != THREAD)
    if not threads or not others:
        return _spread(options, settings)
    return (*_spread(others, settings), *_spread(threads, ON_THREADS))


def _spread(options: tuple[Option, ...], settings: int) -> tuple[Option, ...]:
    """The first and the last of some options, then always the farthest.

    Distances are between log workers, log vCPUs, log memory and log batch; another pool or knob is 1 away. This is the
    greedy maximin design (Johnson, Moore & Ylvisaker, 1990).
    """
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
            else _placeable(stage, workflow.capacity)[-1]
        )
        for stage in workflow.stages
    }


def _placeable(stage: Stage, capacity: Capacity) -> tuple[Option, ...]:
    """Options of a stage that can be placed here; all where none can."""
    options = stage.menu.options()
    return tuple(option for option in options if capacity.places(option)) or options


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
        (o.pool, o.size.kind, o.knobs) != (options[i].pool, options[i].size.kind, options[i].knobs) for o in options
    ]
    return np.asarray(apart + np.asarray(kind, dtype=float))


def _setting(option: Option) -> tuple[object, ...]:
    size = option.size
    return (option.workers, round(size.vcpus, 3), size.kind, option.batch, option.knobs)


def _knobs(workflow: Workflow, stage: str) -> tuple[str, ...]:
    """Names of a stage's declared knobs; none of a stage that the workflow no longer has."""
    return tuple(sorted(workflow[stage].menu.knobs)) if stage in workflow else ()


def _rows_by_setting(known: StageRuns, stage: Stage) -> Counter[tuple[object, ...]]:
    """Rows by ``_setting``; other columns than the menu's knobs, such as input features, are no part of one."""
    rows = known.of_stage(stage.name)
    columns = {name: rows.extra[name] for name in sorted(stage.menu.knobs) if name in rows.extra}
    found: Counter[tuple[object, ...]] = Counter()
    for i in range(len(rows)):
        knobs = tuple((name, column[i]) for name, column in columns.items() if column[i] is not None)
        key = (
            int(rows["workers"][i]),
            round(float(rows["vcpus"][i]), 3),
            str(rows["hardware"][i]),
            int(rows["batch"][i]),
        )
        found[*key, knobs] += 1
    return found

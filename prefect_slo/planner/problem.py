"""The sampled problem: tables compiled into arrays by stage in topological order, and what is asked of them.

    minimise    cost_weight · E[cost] + latency_weight · Q(latency)
    subject to  Q(latency) ≤ latency_bound,  Q(cost) ≤ cost_bound,  constraints,  capacity

``Q`` is the percentile over the samples: at most ``⌊(1 − percentile) · n_samples⌋`` of them may lie above it
(a chance constraint by sample average; Luedtke and Ahmed, SIAM J. Optim. 19(2), 2008, section 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import floor, inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefect_slo.errors import GpuShareTooLarge, InvalidPlan
from prefect_slo.models.makespan import Progress, advance
from prefect_slo.models.tables import SampleTables
from prefect_slo.planner.capacity import Antichains
from prefect_slo.resources import Option
from prefect_slo.workflow import Edge, EdgeKind, Workflow

Choice = tuple[int, ...]
"""One option index per stage, in topological order."""

ROUNDING = 1e-6
"""Relative slack of every comparison with a bound: sums of float32 differ by their order in the seventh digit."""


@dataclass(frozen=True)
class Goal:
    """What is asked of the sampled problem.

    Attributes:
        percentile: Fraction of samples that must keep each bound.
        latency_bound_s: Bound on the percentile of latency.
        cost_bound_usd: Bound on the percentile of cost.
        cost_weight: Weight of mean cost in the objective.
        latency_weight: Weight of the percentile of latency in the objective.
    """

    percentile: float = 0.95
    latency_bound_s: float = inf
    cost_bound_usd: float = inf
    cost_weight: float = 1.0
    latency_weight: float = 0.0

    def allowed(self, n_samples: int) -> int:
        """How many of ``n_samples`` may break a bound."""
        return floor((1.0 - self.percentile) * n_samples * (1 + 1e-12))

    def fastest(self) -> Goal:
        """The least latency within the cost bound, at the same percentile."""
        return replace(self, latency_bound_s=inf, cost_weight=0.0, latency_weight=1.0)

    def within(self, latency_room: float, cost_room: float) -> Goal:
        """The same with its bounds divided by these."""
        bounds = self.latency_bound_s / latency_room, self.cost_bound_usd / cost_room
        return replace(self, latency_bound_s=bounds[0], cost_bound_usd=bounds[1])

    def at(self, percentile: float) -> Goal:
        """The same at another percentile."""
        return replace(self, percentile=percentile)


@dataclass(frozen=True, eq=False)
class CompiledStage:
    """Arrays of one stage.

    Attributes:
        name: Stage name.
        options: Its options; the last axis but one of the tables.
        after: Its dependencies.
        parents: Position and edge kind of its parents.
        latency: ``(n_upstream, n_options, n_samples)`` seconds, 0 where it did not run.
        cost: Same shape, US dollars.
        mean_cost: ``(n_upstream, n_options)`` US dollars.
        waves: ``(n_options,)``, calls that the busiest worker makes one after another.
        piece: ``(n_options,)``, one wave's share of the latency.
        workers: ``(n_options,)``.
        classes: Distinct worker counts, ascending.
        class_of: ``(n_options,)`` index into ``classes``.
        upstream: Position in the first axis by the parents' total workers; empty when there is one row for all.
    """

    name: str
    options: tuple[Option, ...]
    after: tuple[Edge, ...]
    parents: tuple[tuple[int, EdgeKind], ...]
    latency: NDArray[np.float32]
    cost: NDArray[np.float32]
    mean_cost: NDArray[np.float64]
    waves: NDArray[np.float32]
    piece: NDArray[np.float32]
    workers: NDArray[np.int64]
    classes: NDArray[np.int64]
    class_of: NDArray[np.int64]
    upstream: Mapping[int, int]

    @cached_property
    def whole(self) -> bool:
        """Whether every option makes its calls in one wave."""
        return bool((self.waves == 1).all())

    def waves_at(self, index: Any) -> NDArray[np.float32] | float:
        """Waves at some options; plainly 1 where all have one, which is quicker to reckon with."""
        return 1.0 if self.whole else self.waves[index]


@dataclass(frozen=True, eq=False)
class Problem:
    """A workflow, its samples and its structural limits, ready to be searched.

    Attributes:
        workflow: What is planned.
        stages: In topological order.
        driver: ``(n_samples,)`` seconds outside the longest path.
        rules: Pairs ``(earlier, later)`` of stages and the boolean matrix of their options that go together.
        allowed: By stage, which options are allowed at all.
        antichains: Sets of stages that can hold workers at once.
    """

    workflow: Workflow
    stages: tuple[CompiledStage, ...]
    driver: NDArray[np.float32]
    rules: Mapping[tuple[int, int], NDArray[np.bool_]]
    allowed: tuple[NDArray[np.bool_], ...]
    antichains: Antichains

    @classmethod
    def of(cls, tables: SampleTables, pins: Mapping[str, Mapping[str, object]] | None = None) -> Problem:
        """Compile tables, leaving only the pinned options of pinned stages.

        Raises:
            InvalidPlan: A pin that no option of its stage satisfies.
            UnknownStage: A pin of a stage that the workflow does not have.
            GpuShareTooLarge: A stage whose options all ask for more of GPUs than the devices hold.
        """
        workflow = tables.workflow
        position = {name: i for i, name in enumerate(workflow.order)}
        stages = tuple(_compile(tables, name, position) for name in workflow.order)
        allowed = [np.ones(len(stage.options), dtype=bool) for stage in stages]
        for name, choices in (pins or {}).items():
            if not isinstance(choices, Mapping):
                raise InvalidPlan(f"pins.{name}", choices, "a mapping of choices, such as {'workers': 8}")
            kept = set(workflow.pin(name, **choices)[name].menu.options())
            at = position[name]
            allowed[at] &= [option in kept for option in stages[at].options]
            if not allowed[at].any():
                raise InvalidPlan(f"pins.{name}", dict(choices), f"a choice on the menu of {name!r}")
        rules: dict[tuple[int, int], NDArray[np.bool_]] = {}
        for constraint in workflow.constraints:
            names = sorted(dict.fromkeys(constraint.stages), key=position.__getitem__)
            at = position[names[0]]
            if len(names) == 1:
                allowed[at] &= [constraint.holds({names[0]: option}) for option in stages[at].options]
                continue
            pair = (at, position[names[1]])
            matrix = np.array(
                [
                    [constraint.holds({names[0]: a, names[1]: b}) for b in stages[pair[1]].options]
                    for a in stages[at].options
                ]
            )
            rules[pair] = rules.get(pair, np.True_) & matrix
        antichains = Antichains.of(workflow, [stage.options for stage in stages])
        for at, alone in enumerate(antichains.placing.alone if antichains.placing is not None else ()):
            if allowed[at].any() and not (allowed[at] & alone).any():
                raise _unplaceable(workflow, stages[at], allowed[at])
            allowed[at] &= alone
        return cls(
            workflow, stages, np.asarray(tables.driver_s, dtype=np.float32), rules, tuple(allowed), antichains,
        )  # fmt: skip

    @property
    def n_samples(self) -> int:
        return int(self.driver.shape[0])

    @cached_property
    def size(self) -> int:
        """Number of plans on the menu, structural limits left aside."""
        total = 1
        for mask in self.allowed:
            total *= int(mask.sum())
        return total

    def columns(self, index: NDArray[np.intp], costs: NDArray[np.intp] | None = None) -> Problem:
        """The same problem on some of its samples; mean costs stay those of all samples.

        Args:
            index: The samples that latencies are taken from.
            costs: The samples that costs are taken from; without, latencies take their place.
        """
        stages = []
        for stage in self.stages:
            latency = stage.latency.take(index, axis=2)
            cost = latency if costs is None else stage.cost.take(costs, axis=2)
            stages.append(replace(stage, latency=latency, cost=cost))
        return replace(self, stages=tuple(stages), driver=self.driver[index])

    def sample(self, size: int) -> Problem:
        """The same problem on its first ``size`` samples, as a view; mean costs stay those of all samples."""
        if size >= self.n_samples:
            return self
        some = slice(None, size)
        stages = (replace(s, latency=s.latency[:, :, some], cost=s.cost[:, :, some]) for s in self.stages)
        return replace(self, stages=tuple(stages), driver=self.driver[some])

    def upstream_row(self, at: int, choice: Sequence[int]) -> int:
        """Row of a stage's tables, given the choices of its parents."""
        stage = self.stages[at]
        if not stage.upstream:
            return 0
        return stage.upstream[int(sum(self.stages[p].workers[choice[p]] for p, _ in stage.parents))]

    def open_options(self, at: int, choice: Sequence[int]) -> NDArray[np.bool_]:
        """Options of a stage that go with the choices made for the stages before it, capacity included."""
        mask = self.allowed[at].copy()
        for (earlier, later), matrix in self.rules.items():
            if later == at:
                mask &= matrix[choice[earlier]]
        self.antichains.narrow(at, choice, mask)
        return mask

    def admits(self, choice: Sequence[int]) -> bool:
        """Whether a complete choice keeps pins, constraints and capacity."""
        return (
            all(self.allowed[i][o] for i, o in enumerate(choice))
            and all(matrix[choice[a], choice[b]] for (a, b), matrix in self.rules.items())
            and self.antichains.admit(choice)
        )

    def mean_cost(self, choice: Sequence[int]) -> float:
        """Mean cost of a complete choice in US dollars."""
        return float(
            sum(stage.mean_cost[self.upstream_row(i, choice), choice[i]] for i, stage in enumerate(self.stages))
        )

    def latency(self, choice: Sequence[int]) -> NDArray[np.float32]:
        """Latency of every sample, driver included, ``(n_samples,)``."""
        progress: dict[str, Progress] = {}
        end: NDArray[np.floating] | float = 0.0
        for i, stage in enumerate(self.stages):
            own = stage.latency[self.upstream_row(i, choice), choice[i]]
            progress[stage.name] = advance(stage.after, own, progress, stage.waves_at(choice[i]))
            end = np.maximum(end, progress[stage.name].finish)
        return np.asarray(end + self.driver, dtype=np.float32)

    def cost(self, choice: Sequence[int]) -> NDArray[np.float32]:
        """Cost of every sample, ``(n_samples,)``."""
        total = np.zeros(self.n_samples, dtype=np.float32)
        for i, stage in enumerate(self.stages):
            total += stage.cost[self.upstream_row(i, choice), choice[i]]
        return total

    def score(self, choice: Sequence[int], goal: Goal) -> float:
        """Objective of a complete choice; infinite when it breaks a bound or a structural limit."""
        if not self.admits(choice):
            return inf
        latency = self.latency(choice)
        allowed = goal.allowed(self.n_samples)
        if breaks(latency, goal.latency_bound_s) > allowed:
            return inf
        if goal.cost_bound_usd < inf and breaks(self.cost(choice), goal.cost_bound_usd) > allowed:
            return inf
        value = goal.cost_weight * self.mean_cost(choice) if goal.cost_weight else 0.0
        return value + (goal.latency_weight * percentile(latency, allowed) if goal.latency_weight else 0.0)

    def choices(self) -> Iterator[Choice]:
        """Every choice that keeps the structural limits; for tests and tiny menus."""
        for choice in product(*(np.flatnonzero(mask).tolist() for mask in self.allowed)):
            if self.admits(choice):
                yield choice

    def option(self, choice: Sequence[int]) -> dict[str, Option]:
        """The options of a choice, by stage name in the workflow's own order."""
        chosen = {stage.name: stage.options[o] for stage, o in zip(self.stages, choice, strict=True)}
        return {stage.name: chosen[stage.name] for stage in self.workflow.stages}


def breaks(samples: NDArray[np.floating], bound: float) -> int:
    """How many samples lie above a bound."""
    return int(np.count_nonzero(samples > bound * (1 + ROUNDING))) if bound < inf else 0


def percentile(samples: NDArray[np.floating], allowed: int) -> float:
    """The least bound that all but ``allowed`` of the samples keep."""
    rank = samples.shape[-1] - 1 - allowed
    return float(np.partition(samples, rank)[rank])


def _unplaceable(workflow: Workflow, stage: CompiledStage, allowed: NDArray[np.bool_]) -> GpuShareTooLarge:
    """What to say of a stage none of whose options can be placed: about the one that asks for least."""
    offered = [option for option, there in zip(stage.options, allowed, strict=True) if there]
    least = min(offered, key=lambda option: (option.workers * option.size.gpu, option.size.gpu_memory_mb))
    devices = workflow.capacity.devices_of(least) or ()
    asked = f"{least.workers} × {least.size.share}"
    return GpuShareTooLarge(asked, tuple(str(device) for device in devices), f"stage {stage.name!r}")


def _compile(tables: SampleTables, name: str, position: Mapping[str, int]) -> CompiledStage:
    stage, table = tables.workflow[name], tables.stages[name]
    workers = np.array([option.workers for option in table.options])
    classes, class_of = np.unique(workers, return_inverse=True)
    return CompiledStage(
        name=name,
        options=table.options,
        after=stage.after,
        parents=tuple((position[edge.parent], edge.kind) for edge in stage.after),
        latency=np.asarray(table.latency_s, dtype=np.float32),
        cost=np.asarray(table.cost_usd, dtype=np.float32),
        mean_cost=table.cost_usd.mean(axis=2, dtype=np.float64),
        waves=np.asarray(table.waves, dtype=np.float32),
        piece=np.float32(1.0) / np.asarray(table.waves, dtype=np.float32),
        workers=workers,
        classes=classes,
        class_of=class_of,
        upstream={} if len(table.upstream) == 1 else {u: i for i, u in enumerate(table.upstream)},
    )

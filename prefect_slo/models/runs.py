"""Draws of whole runs: of every option that the menus offer, or of one plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from prefect_slo.errors import InvalidValue
from prefect_slo.models.design import Floats
from prefect_slo.models.drawing import Samples32, Shared, beyond_wall_of, cost_of, draw_options, requests_of, waves_of
from prefect_slo.models.driver import Driver
from prefect_slo.models.learning import Learned
from prefect_slo.models.luck import SEEDS, StageLuck, luck_of
from prefect_slo.models.makespan import makespan, stages_run
from prefect_slo.models.tables import SampleTables, StageTable, upstream_sums
from prefect_slo.plan import Prediction, Quantiles, StagePlan
from prefect_slo.resources import Option
from prefect_slo.units import whole
from prefect_slo.workflow import Workflow


@dataclass(frozen=True)
class PlanSamples:
    """Draws of runs of one plan, all arrays of shape ``(n_samples,)``.

    Attributes:
        latency_s: Of the run.
        cost_usd: Of the run, over all stages.
        stage_latency_s: By stage.
        stage_cost_usd: By stage.
        ran: Whether each stage ran.
        stage_start_s: Of a stage's latency, what its workers took to start, of stages where any had to.
    """

    latency_s: Floats
    cost_usd: Floats
    stage_latency_s: Mapping[str, Samples32]
    stage_cost_usd: Mapping[str, Samples32]
    ran: Mapping[str, NDArray[np.bool_]]
    stage_start_s: Mapping[str, Samples32] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanPrediction(Prediction):
    """A prediction together with the draws that it summarises."""

    samples: PlanSamples = field(repr=False, compare=False, kw_only=True)

    @classmethod
    def of(cls, samples: PlanSamples, at: float) -> PlanPrediction:
        """The summary of some draws, with the percentile ``at`` that the plan's objective names."""
        return cls(
            _quantiles(samples.latency_s), _quantiles(samples.cost_usd), float(np.quantile(samples.latency_s, at)),
            float(np.quantile(samples.cost_usd, at)), samples=samples,
        )  # fmt: skip


@dataclass(frozen=True)
class RunSampler:
    """Draws from what is known of a workflow; stages have streams of their own and share the run's input.

    Attributes:
        workflow: Its graph.
        known: What is known of each stage, by hardware.
        chances: Chance of each stage given its parents.
        driver: Time of the flow function beyond the longest path.
    """

    workflow: Workflow
    known: Mapping[str, Mapping[str, Learned]]
    chances: Mapping[str, float]
    driver: Driver

    def tables(
        self, options: Mapping[str, tuple[Option, ...]], n_samples: int, rng: np.random.Generator, cold: bool | float
    ) -> SampleTables:
        """Draws of some options of every stage, for each number of upstream workers where that matters."""
        first, streams = self.streams(rng)
        shared = self.shared(n_samples, first, cold)
        stages = {}
        for name, stream in streams.items():
            needs_sums = any(learned.model.depends_on_upstream for learned in self.known[name].values())
            sums = upstream_sums(self.workflow, name) if needs_sums else (0,)
            latency, cost, _ = self.draw(name, options[name], sums, shared, stream)
            waves = waves_of(self.known[name], options[name])
            stages[name] = StageTable(name, options[name], sums, latency, cost, waves)
        driver = self.driver.sample(n_samples, rng.spawn(1)[0]).astype(np.float32)
        return SampleTables(self.workflow, stages, driver, shared.ran)

    def plan(
        self, chosen: Mapping[str, Option], n_samples: int, rng: np.random.Generator, cold: bool | float,
        blocks: int | None = None, planned: Mapping[str, StagePlan] = MappingProxyType({}),
    ) -> PlanSamples:  # fmt: skip
        """Draws of runs with one option per stage, in blocks that share their parameters or each with its own.

        What ``planned`` says of bundles decides what is billed by the call; without it, a plan of the option would.
        """
        return Luck(self, n_samples, rng, cold, blocks).of(chosen, planned)

    def shared(self, n_samples: int, rng: np.random.Generator, cold: bool | float, blocks: int | None = None) -> Shared:
        """What the stages of a run have in common.

        Raises:
            InvalidValue: ``n_samples`` is no count, or ``cold`` no share.
        """
        whole(n_samples, "n_samples")
        if not isinstance(cold, (bool, int, float)) or not 0.0 <= cold <= 1.0:
            raise InvalidValue("cold", cold, "true, false, or the share of cold runs in [0, 1]")
        ranks, chill = rng.random(n_samples), rng.random(n_samples)
        certain = np.zeros(n_samples)
        uniforms = {name: rng.random(n_samples) if self.chances[name] < 1 else certain for name in self.workflow.order}
        return Shared(ranks, chill, float(cold), stages_run(self.workflow, self.chances, uniforms), blocks)

    def streams(self, rng: np.random.Generator) -> tuple[np.random.Generator, dict[str, np.random.Generator]]:
        """A stream for what stages share, and one for each stage: by position, so that names don't matter."""
        first, *others = rng.spawn(1 + len(self.workflow.order))
        return first, dict(zip(self.workflow.order, others, strict=True))

    def draw(
        self, name: str, options: Sequence[Option], sums: Sequence[int], shared: Shared, stream: np.random.Generator,
        luck: Mapping[str, StageLuck] | None = None, planned: StagePlan | None = None,
    ) -> tuple[Samples32, Samples32, Samples32 | None]:  # fmt: skip
        """Latency and cost, shape ``(len(sums), len(options), n_samples)``; 0 in runs that skip the stage.

        And what starts add to latency, ``(len(options), n_samples)``; ``None`` where no worker has to start.
        """
        wall, busy, start = draw_options(self.known[name], options, sums, shared, stream, luck=luck)
        requests = requests_of(self.known[name], self.workflow[name], options, wall, shared, planned)
        beyond = beyond_wall_of(self.known[name], options, shared)
        cost = cost_of(self.workflow[name].menu, options, wall, busy, requests, beyond)
        ran = shared.ran[name]
        if ran.all():
            return wall, cost, start
        return wall * ran, cost * ran, start * ran if start is not None else None


class Luck:
    """The same runs whatever plan they follow: one draw of parameters, inputs and noise, shared by all plans.

    Two plans are compared, or a plan and what a search makes of it, without the luck of the draw; what was drawn of a
    stage is kept for the next plan that gives it the same option.

    Args:
        sampler: Draws.
        n_samples: Runs.
        rng: Of all draws.
        cold: Whether workers have to start, or the share of runs in which they do.
        blocks: Number of consecutive blocks that share their parameters; ``None`` draws them for every run.
    """

    def __init__(
        self, sampler: RunSampler, n_samples: int, rng: np.random.Generator, cold: bool | float,
        blocks: int | None = None,
    ) -> None:  # fmt: skip
        self._sampler, self._n_samples, self._blocks = sampler, n_samples, blocks
        first, streams = sampler.streams(rng)
        self._seeds = {name: int(stream.integers(SEEDS)) for name, stream in streams.items()}
        self._shared = sampler.shared(n_samples, first, cold, blocks)
        self._driver = sampler.driver.sample(n_samples, rng.spawn(1)[0]).astype(np.float32)
        self._drawn: dict[tuple[str, Option, int, StagePlan | None], _StageRuns] = {}
        self._luck: dict[tuple[str, str], StageLuck] = {}

    def of(
        self, chosen: Mapping[str, Option], planned: Mapping[str, StagePlan] = MappingProxyType({})
    ) -> PlanSamples:  # fmt: skip
        """The runs by a plan, as options by stage, and as stage plans where these say more."""
        workflow = self._sampler.workflow
        drawn = {}
        for name in workflow.order:
            upstream = sum(chosen[parent].workers for parent in workflow[name].parents)
            drawn[name] = self._stage(name, chosen[name], upstream, planned.get(name))
        latency = {name: stage.wall_s for name, stage in drawn.items()}
        cost = {name: stage.cost_usd for name, stage in drawn.items()}
        waves = {name: stage.waves for name, stage in drawn.items()}
        starts = {name: stage.start_s for name, stage in drawn.items() if stage.start_s is not None}
        total = makespan(workflow, latency, waves=waves, start_s=starts, driver_s=self._driver)
        dollars = reduce(np.add, cost.values())
        return PlanSamples(total.astype(float), dollars.astype(float), latency, cost, self._shared.ran, starts)

    def _stage(self, name: str, option: Option, upstream: int, planned: StagePlan | None) -> _StageRuns:
        key = name, option, upstream, planned
        if key not in self._drawn:
            stream, sampler, kind = np.random.default_rng(self._seeds[name]), self._sampler, option.size.kind
            if (name, kind) not in self._luck:
                model = sampler.known[name][kind].model
                self._luck[name, kind] = luck_of(
                    model, self._n_samples, np.random.default_rng(self._seeds[name]), self._blocks
                )
            luck = {kind: self._luck[name, kind]}
            wall, cost, start = sampler.draw(name, (option,), (upstream,), self._shared, stream, luck, planned)
            waves = waves_of(sampler.known[name], (option,))[0]
            own = start[0] if start is not None else None
            self._drawn[key] = _StageRuns(wall[0, 0], cost[0, 0], float(waves), own)
        return self._drawn[key]


@dataclass(frozen=True, eq=False)
class _StageRuns:
    """Wall time and cost of a stage's runs, ``(n_samples,)``, the calls that its busiest worker makes, and starts."""

    wall_s: Samples32
    cost_usd: Samples32
    waves: float
    start_s: Samples32 | None


def _quantiles(values: Floats) -> Quantiles:
    p50, p95, p99 = np.quantile(values, (0.5, 0.95, 0.99)).tolist()
    return Quantiles(float(values.mean()), p50, p95, p99)

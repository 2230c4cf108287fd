"""Draws of whole runs: of every option that the menus offer, or of one plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from prefect_slo.errors import InvalidValue
from prefect_slo.models.design import Floats
from prefect_slo.models.drawing import Samples32, Shared, cost_of, draw_options, waves_of
from prefect_slo.models.driver import Driver
from prefect_slo.models.learning import Learned
from prefect_slo.models.makespan import makespan, stages_run
from prefect_slo.models.tables import SampleTables, StageTable, upstream_sums
from prefect_slo.plan import Prediction, Quantiles
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
    """

    latency_s: Floats
    cost_usd: Floats
    stage_latency_s: Mapping[str, Floats]
    stage_cost_usd: Mapping[str, Floats]
    ran: Mapping[str, NDArray[np.bool_]]


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
        streams, shared = self._shared(n_samples, rng, cold)
        stages = {}
        for name, stream in streams.items():
            needs_sums = any(learned.model.depends_on_upstream for learned in self.known[name].values())
            sums = upstream_sums(self.workflow, name) if needs_sums else (0,)
            latency, cost = self._draw(name, options[name], sums, shared, stream, None)
            waves = waves_of(self.known[name], options[name])
            stages[name] = StageTable(name, options[name], sums, latency, cost, waves)
        driver = self.driver.sample(n_samples, rng.spawn(1)[0]).astype(np.float32)
        return SampleTables(self.workflow, stages, driver, shared.ran)

    def plan(
        self, chosen: Mapping[str, Option], n_samples: int, rng: np.random.Generator, cold: bool | float,
        blocks: int | None = None,
    ) -> PlanSamples:  # fmt: skip
        """Draws of runs with one option per stage, in blocks that share their parameters or each with its own."""
        streams, shared = self._shared(n_samples, rng, cold)
        latency: dict[str, Floats] = {}
        cost: dict[str, Floats] = {}
        waves: dict[str, float] = {}
        for name, stream in streams.items():
            sums = (sum(chosen[parent].workers for parent in self.workflow[name].parents),)
            drawn = self._draw(name, (chosen[name],), sums, shared, stream, blocks)
            latency[name], cost[name] = (values[0, 0].astype(float) for values in drawn)
            waves[name] = float(waves_of(self.known[name], (chosen[name],))[0])
        driver = self.driver.sample(n_samples, rng.spawn(1)[0])
        total = makespan(self.workflow, latency, waves=waves, driver_s=driver)
        return PlanSamples(total, sum(cost.values(), np.zeros(n_samples)), latency, cost, shared.ran)

    def _shared(
        self, n_samples: int, rng: np.random.Generator, cold: bool | float
    ) -> tuple[dict[str, np.random.Generator], Shared]:
        """One stream per stage, by position so that names don't matter, and what the stages of a run share."""
        whole(n_samples, "n_samples")
        if not isinstance(cold, (bool, int, float)) or not 0.0 <= cold <= 1.0:
            raise InvalidValue("cold", cold, "true, false, or the share of cold runs in [0, 1]")
        first, *others = rng.spawn(1 + len(self.workflow.order))
        streams = dict(zip(self.workflow.order, others, strict=True))
        ranks, chill = first.random(n_samples), first.random(n_samples)
        uniforms = {name: first.random(n_samples) for name in self.workflow.order}
        ran = stages_run(self.workflow, self.chances, uniforms)
        return streams, Shared(ranks, chill < float(cold), ran)

    def _draw(
        self, name: str, options: Sequence[Option], sums: Sequence[int], shared: Shared, stream: np.random.Generator,
        blocks: int | None,
    ) -> tuple[Samples32, Samples32]:  # fmt: skip
        """Latency and cost, shape ``(len(sums), len(options), n_samples)``; 0 in runs that skip the stage."""
        wall, busy = draw_options(self.known[name], options, sums, shared, stream, blocks=blocks)
        cost = cost_of(self.workflow[name].menu, options, wall, busy)
        ran = shared.ran[name]
        return (wall, cost) if ran.all() else (wall * ran, cost * ran)


def _quantiles(values: Floats) -> Quantiles:
    p50, p95, p99 = np.quantile(values, (0.5, 0.95, 0.99)).tolist()
    return Quantiles(float(values.mean()), p50, p95, p99)

"""Draws of a model for the planner: tables to search on, and fresh samples of one plan to test it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from prefect_slo.models.tables import SampleTables, upstream_sums
from prefect_slo.plan import Plan
from prefect_slo.planner.problem import Choice, Problem
from prefect_slo.resources import Option
from prefect_slo.workflow import Workflow

TABLE_ENTRIES = 16_000_000
"""Most draws in a table; with more options the search gets fewer samples, so that memory stays under 500 MB."""

GROWTH, ENOUGH_SAMPLES = 4, 4000
"""After a plan failed its test, a search on fewer than 4,000 samples gets four times as many."""

LEAST_SAMPLES = 500
"""Samples that the search gets however large the menu is: 25 of them may break a bound at P95."""

TRUTHS, RUNS = 512, 200
"""Draws of the parameters that a promise is tested on, and runs under each. With fewer runs the percentile under one
truth is too noisy, with fewer truths the confidence."""


class PlanSamples(Protocol):
    """Draws of runs of one plan, ``(n_samples,)`` each."""

    @property
    def latency_s(self) -> NDArray[np.floating]:
        """Latency of the runs."""
        ...

    @property
    def cost_usd(self) -> NDArray[np.floating]:
        """Cost of the runs."""
        ...

    @property
    def stage_latency_s(self) -> Mapping[str, NDArray[np.floating]]:
        """Latency by stage."""
        ...

    @property
    def stage_cost_usd(self) -> Mapping[str, NDArray[np.floating]]:
        """Cost by stage."""
        ...


class TableSource(Protocol):
    """A model of a workflow, as the planner sees it."""

    @property
    def workflow(self) -> Workflow:
        """What it models."""
        ...

    def tables(self, n_samples: int, rng: np.random.Generator, *, cold: bool | float = False) -> SampleTables:
        """Draws of every menu option."""
        ...

    def sample_plan(
        self, plan: Plan | Mapping[str, Option], n_samples: int, rng: np.random.Generator, *, cold: bool | float = False
    ) -> PlanSamples:
        """Draws of runs of one plan, whose options may lie off the menu; a ``Plan`` says how calls are bundled too."""
        ...


class Truths(Protocol):
    """Runs under many draws of the parameters, the same for every plan."""

    def of(self, chosen: Mapping[str, Option]) -> PlanSamples:
        """The runs by a plan, one truth after the other."""
        ...


@runtime_checkable
class UncertainSource(TableSource, Protocol):
    """A model that was learned from finitely many runs, and so doesn't know its own parameters for sure."""

    def truths(self, truths: int, runs: int, rng: np.random.Generator, *, cold: bool | float = False) -> Truths:
        """``runs`` runs under each of ``truths`` draws of the parameters."""
        ...


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws of a model, each use with a stream of its own.

    Attributes:
        model: What is drawn from.
        seed: Root of all streams.
        cold: Whether workers start cold.
        pins: Choices that are fixed.
        samples: Samples per search.
        fresh_samples: Samples per test.
    """

    model: TableSource
    seed: int = 0
    cold: bool | float = False
    pins: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    samples: int = 4000
    fresh_samples: int = 100_000

    def problem(self, attempt: int = 0) -> Problem:
        """The sampled problem of an attempt: new samples, and more of them where the first were few."""
        most = max(LEAST_SAMPLES, TABLE_ENTRIES // table_rows(self.model.workflow))
        samples = max(self.samples, min(self.samples * GROWTH**attempt, ENOUGH_SAMPLES))
        rng = self._stream(0, attempt)
        return Problem.of(self.model.tables(min(samples, most), rng, cold=self.cold), self.pins)

    def fresh(
        self, problem: Problem, choice: Choice, attempt: int = 0
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Latency and cost of a plan in samples that no search has seen, ``(fresh_samples,)`` each."""
        options = problem.option(choice)
        drawn = self.model.sample_plan(options, self.fresh_samples, self._stream(1, attempt), cold=self.cold)
        return np.asarray(drawn.latency_s), np.asarray(drawn.cost_usd)

    @property
    def uncertain(self) -> bool:
        """Whether the model was learned from runs, and may be wrong."""
        return isinstance(self.model, UncertainSource)

    def truths(self, problem: Problem, choice: Choice) -> tuple[NDArray[np.floating], NDArray[np.floating]] | None:
        """Latency and cost under many possible truths, ``(TRUTHS, RUNS)`` each; ``None`` from a model that is sure.

        Truths and runs are the same for all plans: what one exceeds its bounds by says what to ask of the next.
        """
        if self._truths is None:
            return None
        drawn = self._truths.of(problem.option(choice))
        latency, cost = (np.asarray(values).reshape(TRUTHS, RUNS) for values in (drawn.latency_s, drawn.cost_usd))
        return latency, cost

    @cached_property
    def _truths(self) -> Truths | None:
        if not isinstance(self.model, UncertainSource):
            return None
        return self.model.truths(TRUTHS, RUNS, self._stream(2, 0), cold=self.cold)

    def _stream(self, use: int, attempt: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self.seed, use, attempt]))


def table_rows(workflow: Workflow) -> int:
    """Rows that tables can have at most: Σ over stages of options × upstream worker counts."""
    return sum(len(upstream_sums(workflow, stage.name)) * len(stage.menu.options()) for stage in workflow.stages)

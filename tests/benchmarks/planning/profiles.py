"""Measured profiles: workflows with their stage runs, a menu of what was measured, and the judge's tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prefect_slo.models import PlanSamples, SampleTables, StageTable, WorkflowModel
from prefect_slo.models.tables import upstream_sums
from prefect_slo.planner.problem import Goal, Problem
from prefect_slo.planner.sampling import Truths
from prefect_slo.planner.search import search
from prefect_slo.resources import Option
from prefect_slo.workflow import Workflow

LATENCY_BOUNDS = {"video-analytics": (9, 12, 20, 30, 50, 65, 80), "ml-pipeline": (18, 20, 25, 30, 40, 60, 80)}
"""Seconds; other workflows get seven bounds from 1.1 to 6 times their fastest measured plan."""

COST_BOUNDS = {
    "video-analytics": (0.0085, 0.010, 0.012, 0.0145, 0.0175, 0.021, 0.025),
    "ml-pipeline": (0.007, 0.009, 0.0115, 0.015, 0.019, 0.025, 0.032),
}
"""US dollars; other workflows get seven from 1.1 to 4 times their cheapest measured plan."""


@dataclass(frozen=True)
class Measured:
    """A model whose menu is what was measured.

    Attributes:
        model: Draws the samples.
        options: Measured options by stage.
    """

    model: WorkflowModel
    options: Mapping[str, frozenset[Option]]

    @property
    def workflow(self) -> Workflow:
        return self.model.workflow

    def tables(self, n_samples: int, rng: np.random.Generator, *, cold: bool | float = False) -> SampleTables:
        """Draws of the measured options."""
        return self.model.tables(n_samples, rng, cold=cold, only=self.options)

    def sample_plan(
        self, plan: Mapping[str, Option], n_samples: int, rng: np.random.Generator, *, cold: bool | float = False
    ) -> PlanSamples:
        """Draws of runs of one plan."""
        return self.model.sample_plan(plan, n_samples, rng, cold=cold)

    def truths(self, truths: int, runs: int, rng: np.random.Generator, *, cold: bool | float = False) -> Truths:
        """Draws of runs of any plan under each of several truths."""
        return self.model.truths(truths, runs, rng, cold=cold)


@dataclass(frozen=True)
class Profile:
    """A workflow and its stage runs; the last epoch judges, the others teach.

    A run is named by its epoch and setting; epoch 0 is cold.
    """

    workflow: Workflow
    table: pd.DataFrame

    @property
    def name(self) -> str:
        return self.workflow.name

    @property
    def judging(self) -> int:
        return int(self.table["epoch"].max())

    @cached_property
    def options(self) -> Mapping[str, frozenset[Option]]:
        """Options of each stage's menu that were measured."""
        found = {}
        for stage in self.workflow.stages:
            mine = self.table[self.table["stage"] == stage.name]
            seen = set(zip(mine["workers"], mine["memory_mb"], strict=True))
            found[stage.name] = frozenset(o for o in stage.menu.options() if (o.workers, o.memory_mb) in seen)
        return found

    def fitted(self, kind: str = "white-box") -> Measured:
        """The model of every epoch but the judging one, on the measured menu."""
        taught = self.table[self.table["epoch"] != self.judging]
        return Measured(WorkflowModel(self.workflow, kind=kind).fit(taught), self.options)

    @cached_property
    def judge(self) -> Problem:
        """The judging epoch as a problem of one sample: what each option was measured to take and to cost.

        A stage reads as many partitions as its parents had workers; where a setting was measured under that number, its
        rows are taken, else all rows of the setting.
        """
        rows = self.table[self.table["epoch"] == self.judging]
        workers = rows.pivot_table(index="run_id", columns="stage", values="workers")
        stages = {}
        for name in self.workflow.order:
            stage = self.workflow[name]
            mine = rows[rows["stage"] == name]
            upstream = workers.loc[mine["run_id"], list(stage.parents)].sum(axis=1).to_numpy(dtype=int)
            coupled = bool(stage.parents) and (len(set(upstream)) > 1)
            options = tuple(o for o in stage.menu.options() if o in self.options[name])
            sums = upstream_sums(self.workflow, name) if coupled else (0,)
            values = np.array([[_measured(mine, upstream, o, u) for o in options] for u in sums], dtype=np.float32)
            wall, cost = values[:, :, 0, None], values[:, :, 1, None]
            stages[name] = StageTable(name, options, sums, wall, cost, np.ones(len(options), dtype=np.float32))
        ran = {name: np.ones(1, dtype=bool) for name in stages}
        return Problem.of(SampleTables(self.workflow, stages, np.zeros(1, dtype=np.float32), ran))

    def replay(self, plan: Mapping[str, Any]) -> tuple[float, float]:
        """Latency in seconds and cost in US dollars of a plan (stage plans by name), as measured by the judge."""
        choice = [stage.options.index(plan[stage.name].option) for stage in self.judge.stages]
        return float(self.judge.latency(choice)[0]), self.judge.mean_cost(choice)

    def oracle(self, goal: Goal) -> float:
        """Score of the best measured plan, infinite when none keeps the bound; exact."""
        found = search(self.judge, goal, node_limit=2_000_000)
        assert found.complete
        return found.score

    @cached_property
    def fastest_s(self) -> float:
        return self.oracle(Goal().fastest())

    @cached_property
    def cheapest_usd(self) -> float:
        return self.oracle(Goal())

    @property
    def latency_bounds(self) -> Sequence[float]:
        return LATENCY_BOUNDS.get(self.name) or tuple(np.geomspace(1.1, 6.0, 7) * self.fastest_s)

    @property
    def cost_bounds(self) -> Sequence[float]:
        return COST_BOUNDS.get(self.name) or tuple(np.geomspace(1.1, 4.0, 7) * self.cheapest_usd)


def profiles(data: Path) -> Iterator[Profile]:
    """Every workflow of a folder whose subfolders hold ``workflow.toml`` and ``stage_runs.csv``."""
    for path in sorted(data.glob("*/workflow.toml")):
        yield Profile(Workflow.load(path), pd.read_csv(path.with_name("stage_runs.csv")))


def _measured(rows: pd.DataFrame, upstream: np.ndarray, option: Option, above: int) -> tuple[float, float]:
    same = (rows["workers"] == option.workers).to_numpy() & (rows["memory_mb"] == option.memory_mb).to_numpy()
    exact = same & (upstream == above)
    mine = rows[exact if exact.any() else same]
    return (float(mine["wall_s"].mean()), float(mine["cost_usd"].mean())) if len(mine) else (inf, inf)

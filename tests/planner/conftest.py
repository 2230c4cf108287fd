"""Synthetic models: tables with closed forms and known noise, for any graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from prefect_slo.models.makespan import makespan
from prefect_slo.models.tables import SampleTables, StageTable
from prefect_slo.plan import Plan
from prefect_slo.resources import Capacity, Menu, Option, Size
from prefect_slo.workflow import Edge, Stage, Workflow


@dataclass(frozen=True)
class SyntheticModel:
    """``fixed + work / (workers · vcpus)^power + upstream · u``, log-normal noise shared by a stage's options."""

    workflow: Workflow
    fixed: Mapping[str, float]
    work: Mapping[str, float]
    power: Mapping[str, float]
    upstream: Mapping[str, float]
    noise: float = 0.08
    own_noise: float = 0.0
    price: float = 2e-5
    driver: float = 0.05
    probability: bool = True

    def tables(
        self,
        n_samples: int,
        rng: np.random.Generator,
        *,
        cold: bool = False,
        choices: Mapping[str, Sequence[Option]] | None = None,
    ) -> SampleTables:
        stages, ran = {}, {}
        options_of = {s.name: tuple((choices or {}).get(s.name, s.menu.options())) for s in self.workflow.stages}
        streams = dict(zip(self.workflow.order, rng.spawn(len(self.workflow.stages)), strict=True))
        for name in self.workflow.order:
            stage, own = self.workflow[name], streams[name]
            sums = {0}
            for parent in stage.parents:
                sums = {a + option.workers for a in sums for option in options_of[parent]}
            u = np.array(sorted(sums) if self.upstream[name] and stage.parents else [0])
            options = options_of[name]
            power = np.array([o.workers * o.size.vcpus for o in options]) ** self.power[name]
            mean = self.fixed[name] + self.work[name] / power + self.upstream[name] * u[:, None]
            factor = np.exp(self.noise * own.standard_normal(n_samples, dtype=np.float32))
            each = np.exp(self.own_noise * own.standard_normal((len(options), n_samples), dtype=np.float32))
            latency = (mean[:, :, None] * factor * each + (0.5 if cold else 0.0)).astype(np.float32)
            rate = np.array([o.workers * (o.size.vcpus + 0.1) * self.price for o in options])
            cost = (latency * 0.9 * rate[:, None]).astype(np.float32)
            ran[name] = own.random(n_samples) < stage.probability
            if stage.parents:
                ran[name] &= np.logical_or.reduce([ran[p] for p in stage.parents])
            calls = np.array([float(-(-(stage.items or 1) // o.batch)) for o in options])
            waves = np.ceil(calls / [o.workers for o in options]) if stage.fanout == "given" else np.ones(len(options))
            stages[name] = StageTable(
                name, options, tuple(u.tolist()), latency * ran[name], cost * ran[name], waves.astype(np.float32)
            )
        driver = (self.driver * (1 + 0.1 * rng.random(n_samples))).astype(np.float32)
        return SampleTables(self.workflow, stages, driver, ran)

    def sample_plan(
        self, plan: Plan | Mapping[str, Option], n_samples: int, rng: np.random.Generator, *, cold: bool = False
    ) -> SimpleNamespace:
        options = {name: p.option for name, p in plan.stages.items()} if isinstance(plan, Plan) else plan
        tables = self.tables(n_samples, rng, cold=cold, choices={name: (option,) for name, option in options.items()})
        latency = {name: table.latency_s[0, 0] for name, table in tables.stages.items()}
        cost = {name: table.cost_usd[0, 0] for name, table in tables.stages.items()}
        waves = {name: float(table.waves[0]) for name, table in tables.stages.items()}
        return SimpleNamespace(
            latency_s=makespan(self.workflow, latency, waves=waves, driver_s=tables.driver_s),
            cost_usd=sum(cost.values()),
            stage_latency_s=latency,
            stage_cost_usd=cost,
            ran=tables.ran,
        )


def graph(shape: str, n: int, rng: np.random.Generator, item: float = 0.0) -> list[list[tuple[int, str]]]:
    """Parents of each of ``n`` stages of a chain, diamonds in a row, parallel sources, or a random DAG."""

    def kind() -> str:
        return "item" if rng.random() < item else "all"

    if shape == "chain":
        return [[(i - 1, kind())] if i else [] for i in range(n)]
    if shape == "diamonds":
        return [[] if i == 0 else [(i - (2 if i % 3 == 2 else 1), kind())] + ([(i - 2, "all")] if i % 3 == 0 else [])
                for i in range(n)]  # fmt: skip
    if shape == "sources":
        return [[] if i < n // 2 else [(p, kind()) for p in range(n // 2)] if i == n // 2 else [(i - 1, kind())]
                for i in range(n)]  # fmt: skip
    return [
        [(int(p), kind()) for p in rng.choice(i, size=min(i, int(rng.integers(0, 3))), replace=False)] if i else []
        for i in range(n)
    ]


def synthetic(
    shape: str | Sequence[Sequence[tuple[int, str]]] = "chain",
    n: int = 4,
    *,
    seed: int = 0,
    workers: Sequence[int] = (1, 2, 4),
    vcpus: Sequence[float] = (1, 2),
    coupled: float = 0.5,
    item: float = 0.0,
    capacity: Capacity | None = None,
    **kwargs: object,
) -> SyntheticModel:
    """A random model on a graph of ``n`` stages (or given parents); ``coupled`` of them feel their parents' workers."""
    rng = np.random.default_rng(seed)
    menu = Menu("local", tuple(workers), tuple(Size(v, int(1024 * v)) for v in vcpus))
    parents = graph(shape, n, rng, item) if isinstance(shape, str) else shape
    names = [f"s{i}" for i in range(n)]
    stages = tuple(
        Stage(
            names[i],
            tuple(Edge(names[p], kind) for p, kind in parents[i]),
            menu,
            fanout="given" if any(k == "item" for _, k in parents[i]) or item else "planned",
            items=int(rng.integers(4, 40)) if item else None,
        )
        for i in range(n)
    )
    draw = lambda low, high: {name: float(rng.uniform(low, high)) for name in names}  # noqa: E731
    return SyntheticModel(
        Workflow("synthetic", stages, capacity=capacity or Capacity()),
        fixed=draw(0.2, 1.0),
        work=draw(1.0, 20.0),
        power=draw(0.5, 1.0),
        upstream={name: float(rng.uniform(0, 0.1)) if rng.random() < coupled else 0.0 for name in names},
        **kwargs,
    )


@pytest.fixture(scope="session")
def model_of():
    """Random synthetic models; see ``synthetic``."""
    return synthetic

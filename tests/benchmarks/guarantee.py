"""Does a certified plan keep its promise? Many times over: draw a truth, profile it, plan, and judge by the truth.

    python tests/benchmarks/guarantee.py [--replications 1000] [--family inside outside] [--out FILE] [--seconds 600]

One replication draws a workflow of 1 to 4 stages and the true time of each, measures 24 of its settings three times,
plans for P95 ≤ bound with 99 % confidence, and counts how many of 200,000 runs of the truth keep the bound. The plan
*misses* where fewer than 95 % do. Its mean cost is divided by that of the oracle, which plans on draws of the truth.

*inside*: times are posynomials and noise multiplies them, log-normal, Pareto or bimodal. The claim is that at most 1 %
of plans miss. *outside*: a smooth wave of up to 10 % lies over the posynomial, noise grows with workers, and the stages
of a run are slow together. There the plan is run 150 times, learned from, calibrated and made again, then judged.

With ``--out`` every replication is a line of JSON that a later call doesn't repeat; replication k is the same in every
call, so that two calls with different ``--first`` share the work.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.models import WorkflowModel, makespan
from prefect_slo.models.calibration import Calibration
from prefect_slo.models.drawing import cost_of
from prefect_slo.models.tables import SampleTables, StageTable, upstream_sums
from prefect_slo.objective import Latency
from prefect_slo.observation import StageRuns
from prefect_slo.plan import Plan
from prefect_slo.planner.make import make_plan
from prefect_slo.planner.problem import Goal, Problem
from prefect_slo.planner.solver import solve
from prefect_slo.resources import Menu, Option, Size
from prefect_slo.workflow import Edge, Stage, Workflow

Floats = NDArray[np.float64]
Family = Literal["inside", "outside"]

NOISES = ("log-normal", "Pareto", "bimodal")
WORKERS = (1, 2, 4, 8, 16)
VCPUS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
SETTINGS, REPEATS = 24, 3
PERCENTILE, CONFIDENCE = 0.95, 0.99
CALIBRATION_RUNS = 150
JUDGED = 200_000
CLAIM: dict[str, float] = {"inside": 0.01, "outside": 0.08}


@dataclass(frozen=True)
class Noise:
    """Multiplicative noise of median about 1."""

    kind: str
    size: float
    growth: float
    """Its size is multiplied by ``workers ** growth``."""

    def logs(self, n: int, rng: np.random.Generator) -> Floats:
        """Log factors, shape ``(n,)``."""
        if self.kind == "log-normal":
            return self.size * rng.standard_normal(n)
        if self.kind == "Pareto":
            return np.log1p(2.0 * self.size * rng.pareto(4.0, n))
        slow = rng.random(n) < 0.1
        return 0.3 * self.size * rng.standard_normal(n) + np.where(slow, 3.0 * self.size, 0.0)


@dataclass(frozen=True)
class StageTruth:
    """``θ · (1, 1/v, 1/d, 1/(d·v), u) · exp(wave · sin(...))`` and its noise."""

    theta: Floats
    wave: float
    phase: float
    noise: Noise

    def median(self, workers: Floats, vcpus: Floats, upstream: Floats) -> Floats:
        terms = np.stack([np.ones_like(workers), 1 / vcpus, 1 / workers, 1 / (workers * vcpus), upstream])
        bend = self.wave * np.sin(1.3 * np.log2(workers) + 1.7 * np.log2(vcpus) + self.phase)
        seconds: Floats = (self.theta @ terms.reshape(5, -1)).reshape(workers.shape) * np.exp(bend)
        return seconds


class Truth:
    """A workflow whose every distribution is known; planners take it for a model that knows no uncertainty."""

    def __init__(self, workflow: Workflow, stages: Mapping[str, StageTruth], together: float) -> None:
        self.workflow = workflow
        self.stages = stages
        self.together = together

    @classmethod
    def drawn(cls, family: Family, noise: str, rng: np.random.Generator) -> Truth:
        outside = family == "outside"
        menu = Menu("local", WORKERS, tuple(Size(v, int(1024 * v)) for v in VCPUS))
        n = int(rng.integers(1, 5))
        parents: list[tuple[Edge, ...]] = [()]
        for i in range(1, n):
            chosen = rng.choice(i, size=min(i, int(rng.integers(1, 3))), replace=False)
            parents.append(tuple(Edge(f"s{p}") for p in sorted(chosen.tolist())))
        workflow = Workflow("truth", tuple(Stage(f"s{i}", after, menu) for i, after in enumerate(parents)))
        stages = {}
        for stage in workflow.stages:
            theta = rng.exponential((0.5, 1.0, 2.0, 15.0, 0.02)) * (rng.random(5) < (0.8, 0.5, 0.5, 1.0, 0.3))
            theta[0] += 0.2
            size = float(np.exp(rng.uniform(np.log(0.02), np.log(0.15))))
            stages[stage.name] = StageTruth(
                theta,
                float(rng.uniform(0.02, 0.1)) if outside else 0.0,
                float(rng.uniform(0, 2 * np.pi)),
                Noise(noise, size, float(rng.uniform(-0.1, 0.2)) if outside else 0.0),
            )
        return cls(workflow, stages, float(rng.uniform(0.01, 0.06)) if outside else 0.0)

    def tables(self, n_samples: int, rng: np.random.Generator, *, cold: bool | float = False) -> SampleTables:
        options = {stage.name: stage.menu.options() for stage in self.workflow.stages}
        return self._drawn(options, {name: upstream_sums(self.workflow, name) for name in options}, n_samples, rng)

    def sample_plan(
        self, plan: Mapping[str, Option], n_samples: int, rng: np.random.Generator, *, cold: bool | float = False
    ) -> SimpleNamespace:
        sums = {s.name: (sum(plan[p].workers for p in s.parents),) for s in self.workflow.stages}
        tables = self._drawn({name: (option,) for name, option in plan.items()}, sums, n_samples, rng)
        latency = {name: table.latency_s[0, 0] for name, table in tables.stages.items()}
        cost = {name: table.cost_usd[0, 0] for name, table in tables.stages.items()}
        return SimpleNamespace(
            latency_s=makespan(self.workflow, latency),
            cost_usd=np.sum(list(cost.values()), axis=0),
            stage_latency_s=latency,
            stage_cost_usd=cost,
        )

    def _drawn(
        self, options: Mapping[str, Sequence[Option]], sums: Mapping[str, Sequence[int]], n: int,
        rng: np.random.Generator,
    ) -> SampleTables:  # fmt: skip
        common = self.together * rng.standard_normal(n)
        tables = {}
        for name in self.workflow.order:
            stage, known = self.stages[name], options[name]
            d, v = (np.array([float(x) for x in xs]) for xs in zip(*((o.workers, o.vcpus) for o in known), strict=True))
            u = np.array(sums[name], dtype=float)
            shape = (len(u), len(known))
            at = stage.median(*(np.broadcast_to(x, shape) for x in (d, v, u[:, None])))
            logs = stage.noise.logs(n, rng)
            factor = np.exp(np.outer(d**stage.noise.growth, logs) + common).astype(np.float32)
            wall = at.astype(np.float32)[:, :, None] * factor
            cost = cost_of(self.workflow[name].menu, tuple(known), wall, wall)
            tables[name] = StageTable(
                name, tuple(known), tuple(sums[name]), wall, cost, np.ones(len(known), dtype=np.float32)
            )
        ran = {name: np.ones(n, dtype=bool) for name in tables}
        return SampleTables(self.workflow, tables, np.zeros(n, dtype=np.float32), ran)

    def profiled(self, rng: np.random.Generator) -> StageRuns:
        """Every stage at 24 of its 30 settings, three times each, shuffled by stage."""
        runs = [{} for _ in range(SETTINGS * REPEATS)]  # type: list[dict[str, Option]]
        for stage in self.workflow.stages:
            offered = stage.menu.options()
            chosen = rng.choice(len(offered), SETTINGS, replace=False)
            for run, k in zip(runs, rng.permutation(np.repeat(chosen, REPEATS)).tolist(), strict=True):
                run[stage.name] = offered[k]
        return self.measured(runs, rng, "profile")[1]

    def measured(
        self, runs: Sequence[Mapping[str, Option]], rng: np.random.Generator, name: str
    ) -> tuple[Floats, StageRuns]:
        """Latency of each of these runs, ``(n_runs,)``, and their stage runs."""
        rows: dict[str, list[Any]] = {
            c: [] for c in ("run_id", "stage", "workers", "vcpus", "memory_mb", "wall_s", "overhead_s")
        }
        latencies = []
        for k, plan in enumerate(runs):
            drawn = self.sample_plan(plan, 1, rng)
            latencies.append(float(drawn.latency_s[0]))
            for stage, option in plan.items():
                row = (f"{name}-{k:04d}", stage, option.workers, option.vcpus, option.memory_mb)
                values = (*row, float(drawn.stage_latency_s[stage][0]), 0.0)
                for column, value in zip(rows.values(), values, strict=True):
                    column.append(value)
        return np.array(latencies), StageRuns.from_table(rows)

    @cached_property
    def quickest_s(self) -> float:
        """Least P95 latency that any plan reaches."""
        problem = Problem.of(self.tables(2000, np.random.default_rng(0)))
        return solve(problem, Goal(PERCENTILE).fastest()).score


def replication(family: Family, noise: str, number: int, *, judged: int = JUDGED) -> dict[str, Any]:
    """One draw of the experiment."""
    rng = np.random.default_rng([number, NOISES.index(noise), family == "outside"])
    truth = Truth.drawn(family, noise, rng)
    bound = truth.quickest_s * float(np.exp(rng.uniform(np.log(1.3), np.log(4.0))))
    oracle_problem = Problem.of(truth.tables(8000, np.random.default_rng([number, 1])))
    oracle = solve(oracle_problem, Goal(PERCENTILE, bound))
    model = WorkflowModel(truth.workflow).fit(truth.profiled(rng))
    slo = Latency(bound, PERCENTILE, CONFIDENCE)
    result: dict[str, Any] = {"family": family, "noise": noise, "number": number, "stages": len(truth.stages)}
    started = time.process_time()
    try:
        plan = make_plan(model, slo, seed=number)
        if family == "outside":
            plan = _calibrated(truth, model, slo, plan, rng)
    except InfeasibleSlo:
        return {**result, "feasible": False}
    result["plan_s"] = time.process_time() - started
    drawn = truth.sample_plan({n: s.option for n, s in plan.stages.items()}, judged, np.random.default_rng([number, 2]))
    best = truth.sample_plan(oracle_problem.option(oracle.choice), judged // 4, np.random.default_rng([number, 3]))
    return {
        **result,
        "feasible": True,
        "kept": float(np.mean(drawn.latency_s <= bound)),
        "cost": float(drawn.cost_usd.mean() / best.cost_usd.mean()),
        "p95_ratio": float(plan.predicted.latency_s.p95 / np.quantile(drawn.latency_s, PERCENTILE)),
    }


def _calibrated(truth: Truth, model: WorkflowModel, slo: Latency, plan: Plan, rng: np.random.Generator) -> Plan:
    """The plan after 150 runs of the first one: they are learned from, and their scores calibrate the next."""
    options = {name: stage.option for name, stage in plan.stages.items()}
    actual, rows = truth.measured([options] * CALIBRATION_RUNS, rng, "calibration")
    model.update(rows)
    predicted = model.predict(plan, seed=plan.seed).latency_at_percentile_s
    calibration = Calibration(slo.percentile)
    for latency_s in actual.tolist():
        calibration = calibration.observe(latency_s, predicted)
    return make_plan(model, slo, seed=plan.seed, calibration=calibration)


def summary(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of misses and costs, by family and noise."""
    lines = [f"{'family':9}{'noise':12}{'plans':>7}{'none':>6}{'misses':>8}{'share':>8}{'claim':>7}{'p-value':>9}"
             f"{'cost: median':>14}{'90 %':>7}{'P95 ratio':>11}{'CPU s':>7}"]  # fmt: skip
    for family, noise in product(("inside", "outside"), (*NOISES, "all")):
        mine = [r for r in results if r["family"] == family and noise in (r["noise"], "all")]
        made = [r for r in mine if r["feasible"]]
        if not made:
            continue
        misses = sum(r["kept"] < PERCENTILE for r in made)
        claim = CLAIM[family]
        p = binomtest(misses, len(made), claim, alternative="greater").pvalue
        costs, ratios = [r["cost"] for r in made], [r["p95_ratio"] for r in made]
        lines.append(
            f"{family:9}{noise:12}{len(made):7}{len(mine) - len(made):6}{misses:8}{misses / len(made):8.2%}{claim:7.0%}"
            f"{p:9.3f}{np.median(costs):14.3f}{np.quantile(costs, 0.9):7.2f}{np.median(ratios):11.3f}"
            f"{np.mean([r['plan_s'] for r in made]):7.2f}"
        )
    return "\n".join(lines)


def rejected(results: Sequence[Mapping[str, Any]], family: Family, at: float = 0.05) -> bool:
    """Whether the misses are too many to be chance under the claim."""
    made = [r for r in results if r["family"] == family and r["feasible"]]
    misses = sum(r["kept"] < PERCENTILE for r in made)
    return bool(binom.sf(misses - 1, len(made), CLAIM[family]) < at)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replications", type=int, default=1000, help="in all, shared by the kinds of noise")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--family", nargs="+", choices=("inside", "outside"), default=["inside", "outside"])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no replication after this")
    parser.add_argument("--out", type=Path, help="file of results, one a line; what it holds is not run again")
    options = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    if options.out is not None and options.out.exists():
        results = [json.loads(line) for line in options.out.read_text().splitlines()]
    done = {(r["family"], r["noise"], r["number"]) for r in results}
    begun = time.monotonic()
    for number, family in product(range(options.first, options.first + options.replications), options.family):
        key = family, NOISES[number % len(NOISES)], number
        if key in done or time.monotonic() - begun > options.seconds:
            continue
        results.append(replication(*key))
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
    print(summary(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

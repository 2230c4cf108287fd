"""How useful is the first plan, made from a few noisy runs? Predicted and true P95 of the plan, by size of the noise.

    python tests/benchmarks/first_plans.py [--replications 40] [--most 6]

Each replication draws a chain of three stages with four settings each, runs the sweep's own design (every setting
twice, 8 runs in all; up to ``--most`` times where runs differ much), and plans as the loop does: with 99 % confidence,
or with less where no plan has it. The bound is 1.5 times the least P95 that any plan reaches. *ratio* is predicted over
true P95 of the plan: 1 is perfect, above 1 cautious.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

import numpy as np
from guarantee import PERCENTILE, Noise, StageTruth, Truth

from prefect_slo.errors import InfeasibleSlo
from prefect_slo.loop.replanning import surest
from prefect_slo.loop.sweep import design, wanted_repeats
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Latency, Slo
from prefect_slo.observation import StageRuns
from prefect_slo.planner.problem import Goal, Problem
from prefect_slo.planner.solver import solve
from prefect_slo.resources import Menu, Option, Size
from prefect_slo.workflow import Edge, Stage, Workflow

MENU = Menu("local", (1, 2), (Size(1, 1024), Size(2, 2048)))


def truth_of(sigma: float, rng: np.random.Generator) -> Truth:
    """A chain of three stages with log-normal noise."""
    names = ("load", "train", "report")
    after = ((), (Edge("load"),), (Edge("train"),))
    workflow = Workflow("first", tuple(Stage(n, a, MENU) for n, a in zip(names, after, strict=True)))
    stages = {
        name: StageTruth(
            rng.exponential((0.3, 0.5, 1.0, 4.0, 0.0)), 0.0, 0.0, Noise("log-normal", sigma, 0.0),
        )
        for name in names
    }  # fmt: skip
    return Truth(workflow, stages, 0.0)


def swept(
    truth: Truth, known: StageRuns | None, repeats: int, number: int, rng: np.random.Generator
) -> StageRuns:  # fmt: skip
    """Rows of a sweep, after those that are known."""
    todo = design(truth.workflow, known, repeats=repeats, seed=number)
    usual = {stage.name: stage.menu.options()[-1] for stage in truth.workflow.stages}
    runs: list[Mapping[str, Option]] = [todo.setting(k, usual) for k in range(todo.runs)]
    if not runs:
        assert known is not None
        return known
    rows = truth.measured(runs, rng, f"sweep-{repeats}")[1]
    return rows if known is None else known.concat(rows)


def replication(sigma: float, number: int, most: int = 6) -> Mapping[str, float]:
    """One first plan."""
    rng = np.random.default_rng([number, int(1000 * sigma)])
    truth = truth_of(sigma, rng)
    rows = swept(truth, None, 2, number, rng)
    repeats = wanted_repeats(truth.workflow, rows, repeats=2, most=most)
    rows = swept(truth, rows, repeats, number, rng)
    model = WorkflowModel(truth.workflow).fit(rows)
    bound = 1.5 * truth.quickest_s
    problem = Problem.of(truth.tables(8000, np.random.default_rng([number, 1])))
    oracle = problem.mean_cost(solve(problem, Goal(PERCENTILE, bound)).choice or ())
    try:
        plan = surest(model, Slo(latency=Latency(bound)), seed=number)
    except InfeasibleSlo:
        return {"planned": 0.0, "runs": float(len(set(rows["run_id"].tolist())))}
    chosen = {name: stage.option for name, stage in plan.stages.items()}
    drawn = truth.sample_plan(chosen, 50_000, np.random.default_rng([number, 2]))
    assert plan.predicted is not None
    assert plan.certificate is not None
    return {
        "planned": 1.0,
        "runs": float(len(set(rows["run_id"].tolist()))),
        "ratio": plan.predicted.latency_s.p95 / float(np.quantile(drawn.latency_s, PERCENTILE)),
        "kept": float(np.mean(drawn.latency_s <= bound)),
        "cost": float(drawn.cost_usd.mean()) / oracle,
        "confidence": plan.certificate.confidence,
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replications", type=int, default=40)
    parser.add_argument("--most", type=int, default=6, help="runs of a setting at most; 2 is always twice")
    options = parser.parse_args(arguments)
    print("noise   runs: median   planned   ratio: median   10 %   90 %   bound kept: mean   cost: median   with 99 %")
    for sigma in (0.05, 0.1, 0.2, 0.3):
        found = [replication(sigma, number, options.most) for number in range(options.replications)]
        made = [result for result in found if result["planned"]]
        if not made:
            print(f"{sigma:5.0%}{np.median([r['runs'] for r in found]):15.0f}{0:10.0%}")
            continue
        ratio = np.array([result["ratio"] for result in made])
        print(
            f"{sigma:5.0%}{np.median([r['runs'] for r in found]):15.0f}{len(made) / len(found):10.0%}"
            f"{np.median(ratio):16.2f}{np.quantile(ratio, 0.1):7.2f}"
            f"{np.quantile(ratio, 0.9):7.2f}{np.mean([r['kept'] for r in made]):19.1%}"
            f"{np.median([r['cost'] for r in made]):15.2f}{np.mean([r['confidence'] > 0.98 for r in made]):12.0%}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

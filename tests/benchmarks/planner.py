"""Every figure by which the planner is judged, in one table.

    python tests/benchmarks/planner.py --data DIR [--quick] [--out FOLDER] [--only regret planners ...]

``DIR`` (or ``PREFECT_SLO_DATA``) holds folders with ``workflow.toml`` and ``stage_runs.csv``, whose last epoch judges
plans made from the others. Ratios compare what ran in this one process; times are CPU seconds. With ``--out``, a table
(CSV) and a plot (SVG) of every planner over the bounds are written per workflow. Sections:

``models``      held-out error, coverage, end-to-end error against published models, fitting time
``regret``      plans judged by an epoch that nobody saw, against an oracle that knows it
``planners``    the same bounds by every published planner: costs, broken bounds, planning time
``optimality``  the search against brute force on random instances
``speed``       anytime search, large graphs, Pareto front, memory, solve time over the number of samples

The guarantee (``guarantee.py``) and bad input (the test suite) are measured elsewhere.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import models as stage_models
import numpy as np
from planning import fronts, regret, speed
from planning.instances import module
from planning.profiles import Profile, profiles

from prefect_slo.objective import Latency
from prefect_slo.planner.goals import goal_of
from prefect_slo.planner.problem import Problem
from prefect_slo.planner.search import search
from prefect_slo.planner.solver import solve

PUBLISHED = ("empirical", "analytic", "regression")
HELD_OUT = {"video-analytics": (0.026, 0.072, 0.035), "ml-pipeline": (0.056, 0.063, 0.06)}
"""Bars of busy time, wall time and whole runs, where a workflow has them."""


@dataclass(frozen=True)
class Row:
    """A figure, the bar that it should reach, and whether it does; ``None`` where there is no bar."""

    what: str
    figure: str
    bar: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        mark = {True: "ok", False: "MISSED", None: ""}[self.met]
        return f"{self.what:58}{self.figure:34}{self.bar:24}{mark}"


def at_most(what: str, value: float, most: float, form: str = ".2%") -> Row:
    return Row(what, f"{value:{form}}", f"<= {most:{form}}", bool(value <= most))


def at_least(what: str, value: float, least: float, form: str = ".0%") -> Row:
    return Row(what, f"{value:{form}}", f">= {least:{form}}", bool(value >= least))


def of_models(data: Path, quick: bool) -> list[Row]:
    """Errors and coverage of the stage models."""
    rows: list[Row] = []
    for workflow, table in stage_models.workflows(data):
        busy, wall, run = HELD_OUT.get(workflow.name, (inf, inf, inf))
        held = stage_models.held_out(workflow, table, "white-box", 1 if quick else 5)
        whole = {k: stage_models.end_to_end(workflow, table, k) for k in ("white-box", *PUBLISHED)}
        ours, low, high = whole["white-box"], *held["coverage_interval"]
        rows += [
            at_most(f"{workflow.name}: busy time, settings left out", held["busy_error"], busy),
            at_most(f"{workflow.name}: wall time, settings left out", held["wall_error"], wall),
            Row(
                f"{workflow.name}: coverage of P95", f"{held['coverage']:.3f} [{low:.3f}, {high:.3f}]",
                "0.915 to 0.98", 0.915 <= held["coverage"] <= 0.98,
            ),
            at_most(f"{workflow.name}: whole run, P50 error", ours["p50_error"], run),
            at_most(f"{workflow.name}: whole run, P95 error", ours["p95_error"], run),
        ]  # fmt: skip
        for kind in PUBLISHED:
            other = whole[kind]
            ahead = ours["p50_error"] <= other["p50_error"] and ours["p95_error"] <= other["p95_error"]
            figure = f"P50 {other['p50_error']:.2%}, P95 {other['p95_error']:.2%}"
            rows.append(Row(f"{workflow.name}: the same by the {kind} model", figure, "ours ahead", ahead))
    seconds = stage_models.fitting_time()
    rows += [at_most("fit of 8 stages, coefficients (s)", seconds["point_s"], 0.03, ".3f")]
    return [*rows, at_most("fit of 8 stages, everything (s)", seconds["all_s"], 0.25, ".3f")]


def of_regret(found: Sequence[Profile]) -> list[Row]:
    """Plans judged by the last epoch."""
    judged = [row for profile in found for row in regret.judge(profile)]
    for row in judged:
        print(f"  {row}")
    figures = regret.summary(judged)
    rows = [
        at_most("real regret: extra cost, median", figures["extra cost, median"], 0.015),
        at_most("real regret: extra cost, worst", figures["extra cost, worst"], 0.10),
        at_most(f"real regret: misses of {figures['bounds']:.0f}", figures["misses"], 3, ".0f"),
        Row("budgets: extra latency, median", f"{figures['extra latency, median']:.2%}"),
        Row("budgets: extra latency, worst", f"{figures['extra latency, worst']:.2%}"),
    ]
    falling = all(regret.falls(judged, profile.name) for profile in found)
    flat = all(regret.flat(profile) for profile in found)
    return [
        *rows,
        Row("objective falls with the bound", str(falling), "True", falling),
        Row("objective flat past the limit", str(flat), "True", flat),
    ]


def of_planners(found: Sequence[Profile], out: Path | None) -> list[Row]:
    """Every planner on every bound."""
    points = [point for profile in found for point in fronts.points(profile)]
    if out is not None:
        fronts.write(points, out)
    rows = []
    jolteon = fronts.against(points, "jolteon")
    floors = [ratio for profile in found for ratio in fronts.floor_ratios(profile, points, "jolteon")]
    rows += [
        at_most("against Jolteon: cost, median ratio", jolteon["cost ratio, median"], 0.9, ".3f"),
        Row("  the same of the oracle, which nobody can beat", f"{np.median(floors):.3f}"),
        at_most("against Jolteon: planning time, median ratio", jolteon["time ratio, median"], 0.2, ".3f"),
    ]
    for name in fronts.PLANNERS:
        versus = fronts.against(points, name)
        costs = "{cost ratio, median:.3f} ({cost ratio, least:.3f} to {cost ratio, most:.3f})".format(**versus)
        broken = "breaks {bounds broken:.0f}, by P95 {bounds broken by P95:.0f}".format(**versus)
        rows.append(Row(f"our cost over {name}'s; {broken}", costs if name != fronts.OURS else ""))
    worse = fronts.dominating(points)
    for other, own in worse:
        print(f"  dominated: {other}\n        by ours: {own}")
    published = [other for other, _ in worse if "our model" not in other.planner]
    rows.append(at_most("bounds where a published planner dominates ours", len(published), 0, ".0f"))
    rows.append(Row("  where one does that was given our model", f"{len(worse) - len(published)}"))
    for profile in found:
        rows.append(Row(f"{profile.name}: price of the last 7 %", f"{fronts.last_seven_per_cent(profile):.2f} x"))
    return rows


def of_optimality(count: int) -> list[Row]:
    """The search against every plan there is."""
    oracle = module("test_search")
    model_of = module("conftest").synthetic
    asked = equal = wrong = 0
    for seed in range(count):
        tables = oracle.instance(model_of, seed)
        brute, problem = oracle.BruteForce(tables), Problem.of(tables)
        for goal in oracle.goals(brute, np.random.default_rng(seed)) if len(brute.choices) else ():
            best = brute.best(goal)
            for found in (search(problem, goal, node_limit=100_000), solve(problem, goal, 100_000)):
                asked += 1
                wrong += (found.choice is None) != (best == inf)
                equal += found.score == best or abs(found.score / best - 1) <= 3e-6
    return [
        Row(f"optimal on {count} random instances, 4 goals each", f"{equal} of {asked}", "all", equal == asked),
        at_most("  feasible called infeasible, or the reverse", wrong, 0, ".0f"),
    ]


def of_speed(found: Sequence[Profile], quick: bool) -> list[Row]:
    """Times, gaps, proofs and memory of the search."""
    rows: list[Row] = []
    for kind in speed.anytime(2 if quick else 10):
        print(f"  {kind}", flush=True)
        chain, mixed = "chain" in kind.name, "azure" in kind.name
        rows += [
            at_most(f"{kind.name}: time (s), median", float(np.median(kind.seconds)), 0.2, ".2f"),
            at_most(f"{kind.name}: over the optimum, median", float(np.median(kind.regret)), 0.005),
            at_most(f"{kind.name}: gap, median", float(np.median(kind.gap)), 0.01 if chain else 0.03),
        ]
        proven = at_least(f"{kind.name}: proven within 5 s", kind.proven, 0.9)
        rows.append(Row(proven.what, proven.figure) if mixed or "budget" in kind.name else proven)
    for kind in speed.large(1 if quick else 3):
        print(f"  {kind}", flush=True)
        rows.append(at_most(f"{kind.name}: time (s), most", max(kind.seconds), 2.0, ".2f"))
    rows.append(at_most("Pareto front of 20 points, 8 stages (s)", speed.front_seconds(), 2.0, ".2f"))
    script = Path(__file__).parent / "planning" / "memory.py"
    peak = float(subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout)
    rows.append(at_most("peak memory, 50 stages x 64 options (MB)", peak, 500, ".0f"))
    for profile in found:
        for count, (timed, budgeted) in speed.by_samples(profile).items():
            rows.append(Row(f"{profile.name}: make_plan, {count} samples (s)", f"{timed:.2f}, budget {budgeted:.2f}"))
    for profile in found:
        rows.append(_profile_shaped(profile))
    return rows


def _profile_shaped(profile: Profile) -> Row:
    """A plan from a fitted model, process warm: whole ``make_plan`` without drawing tables is less than this."""
    problem = Problem.of(profile.fitted().tables(4048, np.random.default_rng(0)))
    asked = goal_of(Latency(2.0 * profile.fastest_s)).at(0.955)
    found = speed.Search(profile.name)
    begin = time.process_time()
    found.gap.append(solve(problem, asked, speed.QUICK_NODES).gap)
    found.seconds.append(time.process_time() - begin)
    return at_most(f"{profile.name}: search on its own samples (s)", found.seconds[0], 0.2, ".3f")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("PREFECT_SLO_DATA"))
    parser.add_argument("--quick", action="store_true", help="few random instances and one seed")
    parser.add_argument("--out", type=Path, help="folder for the tables and plots of every planner")
    names = ("models", "regret", "planners", "optimality", "speed")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args(arguments)
    found: list[Profile] = []
    if options.data is not None and Path(options.data).is_dir():
        found = list(profiles(Path(options.data)))
    else:
        print("no data: what needs measured profiles is left out; give --data DIR or set PREFECT_SLO_DATA")
    sections: dict[str, Callable[[], list[Row]]] = {
        "models": lambda: of_models(Path(options.data), options.quick) if found else [],
        "regret": lambda: of_regret(found) if found else [],
        "planners": lambda: of_planners(found, options.out) if found else [],
        "optimality": lambda: of_optimality(24 if options.quick else 336),
        "speed": lambda: of_speed(found, options.quick),
    }
    rows: list[Row] = []
    for name in names:
        if name in options.only:
            print(f"{name} ...", flush=True)
            found_rows = sections[name]()
            print("\n".join(f"  {row}" for row in found_rows), flush=True)
            rows += found_rows
    print("\nAll figures\n" + "\n".join(map(str, rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

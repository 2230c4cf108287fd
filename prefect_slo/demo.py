"""The main job on real input: profile a flow, plan it for three deadlines, run it by the plans, compare.

The flow is ``examples/ml_pipeline``: a plain Prefect flow that trains and tests a classifier of handwritten digits.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from prefect import Flow

from prefect_slo.blocks import SLOProfile
from prefect_slo.decorators import director_of, slo
from prefect_slo.demo_report import CONFIDENCE, Calm, DemoReport, Series
from prefect_slo.errors import SloError
from prefect_slo.loop import background
from prefect_slo.loop.director import Following, following
from prefect_slo.loop.menus import capacity_of
from prefect_slo.loop.profiling import Measurement, profile
from prefect_slo.loop.replanning import LESS_SURE
from prefect_slo.loop.sweep import noise_of
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Latency
from prefect_slo.plan import Plan
from prefect_slo.planner.baselines import all_max, all_min
from prefect_slo.planner.deadlines import Deadlines, deadlines, telling
from prefect_slo.pricing import price_list
from prefect_slo.runner.recipe import ObservedRun

FLOW = "ml-pipeline"
REPEATS, MORE_REPEATS = 2, 4
"""Runs of each setting, and where they differ much: of simulated runs of 3 s that differed by 30 %, eight promised a
deadline of 15.9 s, and sixteen one of 5.8 s."""

Heard = Callable[[str, int, int, str], None]
"""Progress: ``(phase, done, of, detail)``."""


@dataclass(frozen=True)
class Swept:
    """What a sweep has shown.

    Attributes:
        runs: How many there were.
        seconds: How long they took.
        model: Of the flow, by all runs so far.
        spread: As of ``Calm``.
    """

    runs: int
    seconds: float
    model: WorkflowModel
    spread: float


Sweep = Callable[[int, str], Swept]


def demo(*, runs: int = 10, scale: float = 1.0, seed: int = 0, heard: Heard = lambda *_: None) -> DemoReport:
    """Profile, plan, run and compare; see the module.

    Args:
        runs: Runs per deadline.
        scale: Multiplies the number of images, and with it the time of every stage.
        seed: Of every draw.
        heard: Called as it goes.

    Raises:
        SloError: The extra ``demo`` isn't installed, or the flow could not be profiled.
    """
    begun, load = time.monotonic(), os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    stock: Flow[Any, Any] = _example().stock
    parameters = {"scale": scale}

    swept, calm, found = steadied(
        _sweeping(stock, parameters, seed, heard), seed=seed, load=load, cores=os.cpu_count() or 1, heard=heard
    )
    heard("plan", 1, 1, f"for {', '.join(f'{bound:.2f} s' for bound in found.bounds_s)}")
    model, series = swept.model, []
    for bound in found.bounds_s:
        asked = slo(latency=bound, confidence=found.confidence, mode="enforce", explore=0, seed=seed)
        flow: Flow[Any, Any] = asked(stock)
        series.append(_run(flow, parameters, runs, f"deadline {bound:.2f} s", bound, heard))
    few, tightest = min(runs, max(runs // 4, 3)), Latency(found.bounds_s[0])
    references = [
        _reference(stock, all_max(model, tightest, seed=seed), parameters, few, "all-max", heard),
        _reference(stock, all_min(model, tightest, seed=seed), parameters, few, "all-min", heard),
        _default_runner(stock, parameters, few, heard),
    ]
    return DemoReport(
        found.confidence, calm, tuple(series), tuple(references), swept.runs, swept.seconds, time.monotonic() - begun
    )


def steadied(sweep: Sweep, *, seed: int, load: float, cores: int, heard: Heard) -> tuple[Swept, Calm, Deadlines]:
    """What the flow's profile shows, how calm the machine was, and the deadlines that can be promised by it.

    Where runs differ so much that deadlines would say little, each setting is measured twice as often, once; what can't
    be promised then as surely as usual is promised less surely.

    Args:
        sweep: Measures the flow at so many runs of each setting, less those that there were; and what that is called.
        seed: Of the planner's draws.
        load: Processes that wanted a core before.
        cores: That there are.
        heard: Progress.
    """
    swept = sweep(REPEATS, "profile")
    calm = Calm(swept.spread, load, cores)
    found = deadlines(swept.model, seed=seed, confidence=CONFIDENCE)
    if found.tell:
        return swept, calm, found
    heard(
        "profile again", 0, 1, f"runs of one setting differ by {swept.spread:.0%}: other work seems to take the cores"
    )
    more = sweep(MORE_REPEATS, "profile again")
    both = replace(more, runs=swept.runs + more.runs, seconds=swept.seconds + more.seconds)
    found = telling(more.model, seed=seed, confidences=(CONFIDENCE, *LESS_SURE))
    return both, replace(calm, after=more.spread), found


def _sweeping(stock: Flow[Any, Any], parameters: Mapping[str, Any], seed: int, heard: Heard) -> Sweep:
    sized: Flow[Any, Any] = slo(latency=3600, mode="enforce", explore=0, seed=seed)(stock)

    def sweep(repeats: int, phase: str) -> Swept:
        def ran(run: Measurement) -> None:
            heard(phase, run.number, run.planned, "failed" if run.error else f"{run.latency_s:.2f} s")

        report = profile(sized, [parameters], max_seconds=600, repeats=repeats, seed=seed, heard=ran)
        if not report.identified:
            why = next((run.error for run in report.runs if run.error), report.stopped)
            raise SloError(f"the demo's flow could not be profiled: {report.known.missing()} ({why})")
        model, stored = report.known.model, SLOProfile.of_flow(sized.name)
        assert model is not None
        rows = stored.training() if stored is not None else None
        spread = noise_of(model.workflow, rows.stage_runs) if rows is not None else math.nan
        return Swept(len(report.runs), report.seconds, model, spread)

    return sweep


def _run(
    flow: Flow[Any, Any], parameters: Mapping[str, Any], runs: int, name: str, bound: float, heard: Heard
) -> Series:
    """Runs of a decorated flow: planned, executed by the plan, compared and learned from."""
    seen: list[ObservedRun] = []
    director = director_of(flow)
    plan: Plan | None = None
    with listening(director, seen):
        for number in range(runs):
            flow(**parameters)
            background.settle()  # each run is planned by all runs before it
            plan = plan or seen[-1].recipe.plan
            heard(name, number + 1, runs, f"{seen[-1].latency_s:.2f} s")
    return Series(name, bound, plan, tuple(r.latency_s for r in seen), tuple(r.cost_usd for r in seen))


@contextmanager
def listening(director: Any, seen: list[ObservedRun]) -> Iterator[None]:
    """Also append what a director observes to ``seen``."""
    observed = director.observed

    def both(run: ObservedRun) -> None:
        seen.append(run)
        observed(run)

    director.observed = both
    try:
        yield
    finally:
        del director.observed


def _reference(
    stock: Flow[Any, Any], plan: Plan, parameters: Mapping[str, Any], runs: int, name: str, heard: Heard
) -> Series:
    seen: list[ObservedRun] = []
    flow: Flow[Any, Any] = slo(latency=3600, mode="enforce", explore=0)(stock)
    for number in range(runs):
        with following(Following(plan=plan, heard=seen.append, mode="reference")):
            flow(**parameters)
        heard(name, number + 1, runs, f"{seen[-1].latency_s:.2f} s")
    return Series(name, math.nan, plan, tuple(r.latency_s for r in seen), tuple(r.cost_usd for r in seen))


def _default_runner(stock: Flow[Any, Any], parameters: Mapping[str, Any], runs: int, heard: Heard) -> Series:
    """Prefect's default task runner reserves nothing: it is priced as the whole machine for as long as it runs."""
    took: list[float] = []
    plain = stock.with_options()
    plain.fn = _clocked(stock.fn, took)
    for number in range(runs):
        plain(**parameters)
        heard("default runner", number + 1, runs, f"{took[-1]:.2f} s")
    machine, prices = capacity_of(), price_list("local")
    rate = prices.rate(machine.vcpus or 1, machine.memory_mb or 0)
    return Series("Prefect's default runner", math.nan, None, tuple(took), tuple(rate * t for t in took))


def _clocked(fn: Callable[..., Any], took: list[float]) -> Callable[..., Any]:
    def clocked(scale: float = 1.0) -> Any:
        begun = time.monotonic()
        result = fn(scale)
        took.append(time.monotonic() - begun)
        return result

    return clocked


def _example() -> ModuleType:
    """The example's module: beside the package in a checkout, inside it in a wheel."""
    if importlib.util.find_spec("sklearn") is None:
        raise SloError("the demo needs scikit-learn. Install it with: pip install 'prefect-slo[demo]'")
    package = Path(__file__).parent
    places = (package.parent / "examples" / "ml_pipeline" / "flow.py", package / "examples" / "ml_pipeline.py")
    for place in places:
        if place.is_file():
            spec = importlib.util.spec_from_file_location("prefect_slo_demo_flow", place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            return module
    raise SloError(f"the demo's flow is missing; looked at {', '.join(map(str, places))}")

"""The main job on real input: profile a flow, plan it for three deadlines, run it by the plans, compare.

The flow is ``examples/ml_pipeline``: a plain Prefect flow that trains and tests a classifier of handwritten digits.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from prefect import Flow

from prefect_slo.attainment import Attainment
from prefect_slo.decorators import director_of, slo
from prefect_slo.errors import InfeasibleSlo, SloError
from prefect_slo.loop import background
from prefect_slo.loop.director import Following, following
from prefect_slo.loop.menus import capacity_of
from prefect_slo.loop.profiling import Measurement, profile
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Latency, Slo
from prefect_slo.plan import Plan
from prefect_slo.planner import make_plan
from prefect_slo.planner.baselines import all_max, all_min
from prefect_slo.pricing import price_list
from prefect_slo.runner.recipe import ObservedRun

FLOW = "ml-pipeline"
TIGHT, LOOSE = 1.05, 1.02
"""The tightest deadline is 5 % over the nearest that can be kept, the loosest 2 % over what the cheapest plan needs."""


@dataclass(frozen=True)
class Series:
    """Runs of one way to run the flow.

    Attributes:
        name: What it is, e.g. ``"deadline 3.2 s"``.
        bound_s: Its deadline; ``nan`` for a reference.
        plan: The first plan that it followed; ``None`` for Prefect's default runner.
        latency_s: Of each run.
        cost_usd: Of each run.
    """

    name: str
    bound_s: float
    plan: Plan | None
    latency_s: tuple[float, ...]
    cost_usd: tuple[float, ...]

    @property
    def attainment(self) -> Attainment:
        """Runs that kept the deadline, of all."""
        return Attainment(sum(latency <= self.bound_s for latency in self.latency_s), len(self.latency_s))

    @property
    def mean_cost_usd(self) -> float:
        return statistics.fmean(self.cost_usd) if self.cost_usd else math.nan

    @property
    def mean_latency_s(self) -> float:
        return statistics.fmean(self.latency_s) if self.latency_s else math.nan


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured.

    Attributes:
        deadlines: One series per deadline, tightest first.
        references: Everything at its largest, at its smallest, and Prefect's default task runner.
        profiling_runs: Runs of the sweep.
        profiling_s: How long it took.
        total_s: The whole demo.
    """

    deadlines: tuple[Series, ...]
    references: tuple[Series, ...]
    profiling_runs: int
    profiling_s: float
    total_s: float

    @property
    def pooled(self) -> Attainment:
        """Over all deadlines."""
        met = sum(series.attainment.met for series in self.deadlines)
        return Attainment(met, sum(series.attainment.runs for series in self.deadlines))

    def to_document(self) -> dict[str, Any]:
        """All figures, for ``--json``."""
        pooled = self.pooled
        return {
            "profiling": {"runs": self.profiling_runs, "seconds": self.profiling_s},
            "deadlines": [_series_document(series) for series in self.deadlines],
            "references": [_series_document(series) for series in self.references],
            "pooled": {"met": pooled.met, "runs": pooled.runs, "interval": list(pooled.interval())},
            "total_s": self.total_s,
        }


Heard = Callable[[str, int, int, str], None]
"""Progress: ``(phase, done, of, detail)``."""


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
    begun = time.monotonic()
    stock: Flow[Any, Any] = _example().stock
    parameters = {"scale": scale}

    def swept(run: Measurement) -> None:
        detail = "failed" if run.error else f"{run.latency_s:.2f} s"
        heard("profile", run.number, run.planned, detail)

    sized: Flow[Any, Any] = slo(latency=3600, mode="enforce", explore=0, seed=seed)(stock)
    report = profile(sized, [parameters], max_seconds=600, seed=seed, heard=swept)
    if not report.identified:
        why = next((run.error for run in report.runs if run.error), report.stopped)
        raise SloError(f"the demo's flow could not be profiled: {report.known.missing()} ({why})")
    model = report.known.model
    assert model is not None
    heard("plan", 0, 1, "")
    bounds = deadlines(model, seed)
    series = []
    for bound in bounds:
        flow: Flow[Any, Any] = slo(latency=bound, mode="enforce", explore=0, seed=seed)(stock)
        series.append(_run(flow, parameters, runs, f"deadline {bound:.2f} s", bound, heard))
    few, tightest = min(runs, max(runs // 4, 3)), Latency(bounds[0])
    references = [
        _reference(stock, all_max(model, tightest, seed=seed), parameters, few, "all-max", heard),
        _reference(stock, all_min(model, tightest, seed=seed), parameters, few, "all-min", heard),
        _default_runner(stock, parameters, few, heard),
    ]
    return DemoReport(tuple(series), tuple(references), len(report.runs), report.seconds, time.monotonic() - begun)


def deadlines(model: WorkflowModel, seed: int) -> tuple[float, float, float]:
    """Three deadlines that differ in what they need: just feasible, halfway, and one that the cheapest plan keeps."""
    cheapest = make_plan(model, Slo(latency=Latency(3600)), seed=seed)
    assert cheapest.predicted is not None
    loose = LOOSE * cheapest.predicted.latency_at_percentile_s
    tight = loose
    try:
        make_plan(model, Latency(0.001), seed=seed)
    except InfeasibleSlo as error:
        tight = TIGHT * error.nearest.bound if error.nearest is not None else loose
    return _in_hundredths(tight), _in_hundredths(max((tight + loose) / 2, tight)), _in_hundredths(max(loose, tight))


def _in_hundredths(bound_s: float) -> float:
    return math.ceil(100 * bound_s) / 100


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


def _series_document(series: Series) -> dict[str, Any]:
    predicted = series.plan.predicted if series.plan is not None else None
    document: dict[str, Any] = {
        "name": series.name,
        "latency_s": list(series.latency_s),
        "cost_usd": list(series.cost_usd),
        "predicted_mean_s": predicted.latency_s.mean if predicted else None,
        "predicted_p95_s": predicted.latency_at_percentile_s if predicted else None,
        "predicted_cost_usd": predicted.cost_usd.mean if predicted else None,
    }
    if math.isfinite(series.bound_s):
        kept = series.attainment
        document |= {
            "deadline_s": series.bound_s,
            "met": kept.met,
            "runs": kept.runs,
            "interval": list(kept.interval()),
        }
    return document

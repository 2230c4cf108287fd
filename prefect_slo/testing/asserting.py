"""``assert_meets_slo``: a test that fails when a flow's plan doesn't keep its bound."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import Flow, Task

from prefect_slo.artifacts.forecast import stage_forecasts
from prefect_slo.artifacts.text import seconds_text, share_text
from prefect_slo.attainment import Attainment
from prefect_slo.blocks import SLOProfile
from prefect_slo.decorators import director_of
from prefect_slo.errors import InfeasibleSlo, InvalidValue, NotEnoughObservations, UnknownFlow
from prefect_slo.loop.knowledge import Fitted, Knowledge
from prefect_slo.loop.policy import PastRun
from prefect_slo.loop.replanning import fits, replan
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Slo
from prefect_slo.plan import Plan
from prefect_slo.planner import make_plan
from prefect_slo.runner.graph import split_key
from prefect_slo.telemetry.ledger import Ledger
from prefect_slo.testing.virtual import virtual_runs
from prefect_slo.units import fraction, whole


class SloNotMet(AssertionError):
    """A flow doesn't keep its bound.

    Attributes:
        attainment: Virtual runs that kept it, of all.
        slo: The bound.
        worst: The stage that takes most of the runs' longest path.
    """

    def __init__(self, message: str, attainment: Attainment, slo: Slo, worst: str) -> None:
        super().__init__(message)
        self.attainment, self.slo, self.worst = attainment, slo, worst


def assert_meets_slo(
    flow: Flow[Any, Any],
    *,
    runs: int = 1000,
    profile: SLOProfile | WorkflowModel | str | Path | None = None,
    plan: Plan | None = None,
    confidence: float = 0.99,
    seed: int = 0,
) -> Attainment:
    """Fail where runs of a decorated flow by its plan don't keep its bound.

    Runs are virtual: the plan is carried out by the package's own scheduler on a fake backend, with item times drawn
    from the profile's model, so a thousand runs take a second or two and no task is called. It fails where so few runs
    keep the bound that a plan which keeps it as often as it must would show that with a chance below 1 − ``confidence``
    (Clopper and Pearson's one-sided bound). It speaks of the work as it was measured: a task whose code has changed
    since then gives a warning, as its profile no longer speaks of it.

    Args:
        flow: A flow decorated with ``@slo``.
        runs: Virtual runs; more of them tell smaller misses.
        profile: What is known of the flow: a file that ``store_profile`` wrote, a profile, or a fitted model. By
            default the profile that the Prefect API holds.
        plan: What is run; by default the plan in force where it is for this bound, else the one that would be made.
        confidence: How sure a failure must be.
        seed: Of the draws; the same profile and seed give the same verdict.

    Returns:
        Virtual runs that kept the bound, of all.

    Raises:
        SloNotMet: It doesn't keep its bound; an ``AssertionError`` that says how often it does, which stage takes most,
            and what to do.
        NotEnoughObservations: The profile is missing, or can't be planned on.
        InvalidValue: The flow isn't decorated, or an argument that can't be.

    Example:
        ```python
        from prefect_slo.testing import assert_meets_slo

        def test_the_pipeline_keeps_its_deadline():
            assert_meets_slo(pipeline, profile="tests/pipeline.profile.json")
        ```
    """
    slo = director_of(flow).slo
    known = _known(flow, profile)
    model = known.model
    if model is None or known.workflow is None or known.missing():
        raise NotEnoughObservations(f"any of flow {flow.name}", 0, 1, f"{known.missing()}. Profile it, and store that.")
    chosen = plan or _plan(known, slo, seed)
    whole(runs, "runs")
    found = list(virtual_runs(model, chosen, runs, seed=seed))
    met = sum(PastRun("", run.latency_s, cost_usd=run.cost_usd).met(slo) for run in found)
    attainment = Attainment(met, runs)
    one_sided = 1 - 2 * (1 - fraction(confidence, "confidence"))
    if attainment.interval(max(one_sided, 1e-9))[1] < slo.percentile:
        raise _not_met(
            flow.name, slo, attainment, statistics.fmean(run.latency_s for run in found), model, chosen, seed
        )
    return attainment


def store_profile(flow: Flow[Any, Any] | str, path: str | Path) -> Path:
    """Write what is known of a flow to a file, to keep beside its tests.

    Args:
        flow: A flow, or its name.
        path: Where to.

    Raises:
        UnknownFlow: Nothing is known of it.
        httpx.HTTPError: The API cannot be reached.
    """
    name = flow if isinstance(flow, str) else flow.name
    found = SLOProfile.of_flow(name)
    if found is None:
        raise UnknownFlow(name, "Profile it first: prefect-slo profile.")
    document = {field: getattr(found, field) for field in sorted(SLOProfile.model_fields)}
    Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return Path(path)


def _known(flow: Flow[Any, Any], profile: SLOProfile | WorkflowModel | str | Path | None) -> Knowledge:
    if isinstance(profile, WorkflowModel):
        return Knowledge(flow.name, profile.workflow, Fitted.of(profile))
    if isinstance(profile, (str, Path)):
        profile = _read(Path(profile))
    if profile is None:
        profile = SLOProfile.of_flow(flow.name)
    if profile is None:
        return Knowledge(flow.name)
    if not isinstance(profile, SLOProfile):
        raise InvalidValue("profile", profile, "a file, an SLOProfile, a WorkflowModel or None")
    for name in _changed(flow, profile.ledger()):
        warnings.warn(
            f"the code of task {name!r} has changed since it was measured: profile {flow.name!r} again.", stacklevel=3
        )
    return Knowledge.of(flow.name, profile)


def _read(path: Path) -> SLOProfile:
    try:
        return SLOProfile(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        expected = f"a file that prefect_slo.testing.store_profile wrote ({type(error).__name__}: {error})"
        raise InvalidValue("profile", str(path), expected) from None


def _changed(flow: Flow[Any, Any], ledger: Ledger) -> Iterator[str]:
    """Names of measured tasks that the flow's function names, at a version of their code that was never measured."""
    measured: dict[str, set[str]] = {}
    for code in ledger.groups:
        measured.setdefault(code.task_key, set()).add(code.source_hash)
    for task in _tasks(flow):
        key, source = split_key(task.task_key)
        if key in measured and source not in measured[key]:
            yield task.name


def _tasks(flow: Flow[Any, Any]) -> Iterator[Task[Any, Any]]:
    fn = flow.fn
    while hasattr(fn, "__wrapped__"):
        fn = fn.__wrapped__
    cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=False))
    for name in (*fn.__code__.co_names, *cells):
        value = cells[name].cell_contents if name in cells else fn.__globals__.get(name)
        if isinstance(value, Task):
            yield value


def _plan(known: Knowledge, slo: Slo, seed: int) -> Plan:
    """The plan in force where it is for this bound, else what a run would follow."""
    assert known.workflow is not None
    if known.plan is not None and fits(known.plan, known.workflow, slo):
        return known.plan
    made, _ = replan(known, slo, seed=seed)
    assert made is not None  # the flow can be planned
    return made


def _not_met(
    name: str, slo: Slo, attainment: Attainment, mean_s: float, model: WorkflowModel, plan: Plan, seed: int
) -> SloNotMet:
    low, high = attainment.interval()
    forecasts = stage_forecasts(model, plan)
    worst = max(forecasts, key=lambda stage: forecasts[stage].critical * forecasts[stage].mean_s)
    try:
        make_plan(model, slo, seed=seed)
        advice = "Another plan keeps it: plan again with 'prefect-slo refit', or leave plan= out."
    except InfeasibleSlo as error:
        advice = str(error)
    message = (
        f"{name}: {slo} is kept by {attainment.met} of {attainment.runs} virtual runs, {share_text(attainment.share)} "
        f"(95 % interval {share_text(low)} to {share_text(high)}), and {share_text(slo.percentile)} have to. "
        f"A run takes {seconds_text(mean_s)} on average; {worst!r} takes {seconds_text(forecasts[worst].mean_s)} of it "
        f"and is on the longest path in {share_text(forecasts[worst].critical)} of runs. {advice}"
    )
    return SloNotMet(message, attainment, slo, worst)

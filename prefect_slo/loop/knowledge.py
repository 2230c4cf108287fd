"""What is known of a flow when a run of it starts: its profile, read from the API once per process and revision."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prefect_slo.artifacts.forecast import StageForecast
from prefect_slo.blocks.folding import IDENTIFIED, OUTGROWN, fit_model
from prefect_slo.blocks.profile import SLOProfile
from prefect_slo.loop.policy import PastRun
from prefect_slo.objective import Slo
from prefect_slo.plan import Plan
from prefect_slo.telemetry.impatience import impatient
from prefect_slo.telemetry.ledger import RunSummary
from prefect_slo.workflow import Workflow

if TYPE_CHECKING:
    from prefect_slo.models import WorkflowModel

FRESH_S = 30.0
"""A profile read this recently is not read again: runs in a row learn through ``remember``."""


UNPICKLED = "unpickled:"
"""Facts of a run that begin so name a stage that doesn't pickle, and hold the hash of its code."""


@dataclass(frozen=True)
class Verdict:
    """Whether a stage was measured well enough to plan it, and why, or why not."""

    identified: bool
    reason: str


class Fitted:
    """A fitted model that is opened when it is first asked for.

    Opening one fits it to the rows that are stored, 0.2 s for 5 stages, 0.5 s for 30. A run that follows the plan in
    force does without: what it asks, whether each stage can be planned, is stored beside the rows.

    Args:
        open_: Opens it.
        verdicts: On each stage; asked of the model where they are missing.
    """

    def __init__(self, open_: Callable[[], WorkflowModel], verdicts: Mapping[str, Verdict] | None = None) -> None:
        self._open, self._verdicts = open_, verdicts

    @classmethod
    def of(cls, model: WorkflowModel) -> Fitted:
        """One that is open."""
        return cls(lambda: model)

    @classmethod
    def stored(cls, profile: SLOProfile, workflow: Workflow) -> Fitted | None:
        """That of a profile; ``None`` where it has none."""
        document = profile.model_document()
        if document is not None:
            told = document.get(IDENTIFIED)
            verdicts = {name: Verdict(*verdict) for name, verdict in told.items()} if told is not None else None
            return cls(lambda: _opened(workflow, document), verdicts)
        training = profile.training() if profile.fit_note == OUTGROWN else None
        if training is None:
            return None
        rows, latency_s = training.stage_runs, training.run_latency_s
        return cls(lambda: _opened(workflow, fit_model(workflow, rows, latency_s)))

    @cached_property
    def model(self) -> WorkflowModel:
        """The model."""
        return self._open()

    def on(self, workflow: Workflow) -> Fitted:
        """The same for a workflow with another capacity."""

        def moved() -> WorkflowModel:
            model = copy(self.model)
            model.workflow = workflow
            return model

        return Fitted(moved, self._verdicts)

    def verdict(self, stage: str) -> Verdict:
        """Whether a stage can be planned."""
        if self._verdicts is not None and stage in self._verdicts:
            return self._verdicts[stage]
        found = self.model.identified(stage)
        return Verdict(bool(found), found.reason)


@dataclass(frozen=True)
class Knowledge:
    """A flow's profile, opened.

    Attributes:
        flow_name: Name of the flow.
        workflow: Its graph with menus; ``None`` before the first completed run.
        fitted: Its fitted model, open or not; ``None`` where there is none.
        plan: The plan in force.
        past: Runs so far that completed or timed out, oldest first.
        on_threads: Stages that are known not to pickle, with the hash of their code.
        history: Entries of the plans that were in force before this one, oldest first.
        revision: Of the profile.
        made: Plans made from this knowledge so far, by objective and size of input.
        forecasts: What the model says of each stage under a plan, by the plan's digest.
        elsewhere: The same with the GPUs of other places, or of other times, by these; a copy begins without.
    """

    flow_name: str
    workflow: Workflow | None = None
    fitted: Fitted | None = None
    plan: Plan | None = None
    past: tuple[PastRun, ...] = ()
    on_threads: Mapping[str, str] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    revision: int = 0
    made: dict[tuple[Slo, tuple[tuple[str, float], ...]], Plan] = field(default_factory=dict, compare=False)
    forecasts: dict[str, Mapping[str, StageForecast]] = field(default_factory=dict, compare=False)
    elsewhere: dict[object, Knowledge] = field(default_factory=dict, init=False, compare=False)

    @classmethod
    def of(cls, flow_name: str, profile: SLOProfile | None) -> Knowledge:
        """What a profile says; nothing where there is none."""
        if profile is None:
            return cls(flow_name)
        workflow = profile.workflow()
        fitted = Fitted.stored(profile, workflow) if workflow is not None else None
        ledger = profile.ledger()
        completed = ledger.completed()
        past = tuple(_past(run) for run in ledger.counted())
        return cls(
            flow_name, workflow, fitted, profile.plan_in_force(), past,
            on_threads=_unpickled(completed[-1].facts) if completed else {},
            history=tuple(profile.plan_history[:-1]),
            revision=profile.revision,
        )  # fmt: skip

    @property
    def model(self) -> WorkflowModel | None:
        """The fitted model, opened now where it isn't yet; ``None`` where there is none."""
        return self.fitted.model if self.fitted is not None else None

    def missing(self) -> str:
        """Why the flow can't be planned yet, in words; empty when it can."""
        if self.workflow is None or self.fitted is None:
            return "it has not been observed yet"
        for stage in self.workflow.stages:
            verdict = self.fitted.verdict(stage.name)
            if not verdict.identified:
                return f"stage {stage.name!r}: {verdict.reason}"
        return ""


class _Remembered:
    """Knowledge by flow name, with the instant it was read."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, Knowledge]] = {}
        self._lock = threading.Lock()

    def get(self, flow_name: str) -> Knowledge:
        with self._lock:
            read, known = self._known.get(flow_name, (-math.inf, Knowledge(flow_name)))
        if time.monotonic() - read < FRESH_S:
            return known
        try:
            with impatient():
                profile = SLOProfile.of_flow(flow_name)
        except Exception:
            if not known.revision:
                raise
            return self.put(known)  # what was known a while ago is better than nothing
        if profile is not None and profile.revision == known.revision:
            return self.put(known)  # nothing new
        return self.put(Knowledge.of(flow_name, profile))

    def put(self, known: Knowledge) -> Knowledge:
        with self._lock:
            self._known[known.flow_name] = (time.monotonic(), known)
        return known

    def forget(self, flow_name: str) -> None:
        with self._lock:
            self._known.pop(flow_name, None)


_REMEMBERED = _Remembered()


def knowledge(flow_name: str) -> Knowledge:
    """What is known of a flow.

    Raises:
        httpx.HTTPError: The API cannot be reached.
    """
    return _REMEMBERED.get(flow_name)


def remember(flow_name: str, profile: SLOProfile) -> Knowledge:
    """Take a profile just saved for what is known."""
    return _REMEMBERED.put(Knowledge.of(flow_name, profile))


def remember_plan(known: Knowledge, profile: SLOProfile) -> Knowledge:
    """Take a profile for what is known in which nothing but the plan has changed, unless others wrote to it, too."""
    if profile.revision != known.revision + 1:
        return remember(known.flow_name, profile)
    history = tuple(profile.plan_history[:-1])
    changed = replace(known, plan=profile.plan_in_force(), history=history, revision=profile.revision, made={})
    return _REMEMBERED.put(changed)


def forget(flow_name: str) -> None:
    """Have the profile read anew at the next run."""
    _REMEMBERED.forget(flow_name)


def _opened(workflow: Workflow, document: Mapping[str, Any]) -> WorkflowModel:
    from prefect_slo.models import WorkflowModel

    return WorkflowModel.from_document(workflow, document, measured_items=True)


def _past(run: RunSummary) -> PastRun:
    timed_out = run.status == "timed_out"
    return PastRun(
        plan=str(run.facts.get("plan_digest") or ""),
        latency_s=run.latency_s,
        predicted_s=math.nan if timed_out else _number(run.facts.get("predicted_s")),
        cost_usd=_number(run.facts.get("cost_usd")),
        timed_out=timed_out,
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _unpickled(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name.removeprefix(UNPICKLED): str(source) for name, source in facts.items() if name.startswith(UNPICKLED)}

"""What is known of a flow when a run of it starts: its profile, read from the API once per process and revision."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefect_slo.blocks.profile import SLOProfile
from prefect_slo.loop.policy import PastRun
from prefect_slo.models import WorkflowModel
from prefect_slo.objective import Slo
from prefect_slo.plan import Plan
from prefect_slo.workflow import Workflow

FRESH_S = 30.0
"""A profile read this recently is not read again: runs in a row learn through ``remember``."""


@dataclass(frozen=True)
class Knowledge:
    """A flow's profile, opened.

    Attributes:
        flow_name: Name of the flow.
        workflow: Its graph with menus; ``None`` before the first completed run.
        model: Its fitted model; ``None`` where there is none.
        plan: The plan in force.
        past: Runs so far, oldest first.
        on_threads: Stages that are known not to pickle.
        made: Plans made from this knowledge so far, by objective.
    """

    flow_name: str
    workflow: Workflow | None = None
    model: WorkflowModel | None = None
    plan: Plan | None = None
    past: tuple[PastRun, ...] = ()
    on_threads: frozenset[str] = frozenset()
    made: dict[Slo, Plan] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, flow_name: str, profile: SLOProfile | None) -> Knowledge:
        """What a profile says; nothing where there is none."""
        if profile is None:
            return cls(flow_name)
        workflow, document = profile.workflow(), profile.model_document()
        model = WorkflowModel.from_document(workflow, document) if workflow is not None and document else None
        completed = profile.ledger().completed()
        past = tuple(_past(run.facts, run.latency_s) for run in completed)
        unpickled = frozenset(str(s) for run in completed[-1:] for s in _list(run.facts.get("on_threads")))
        return cls(flow_name, workflow, model, profile.plan_in_force(), past, unpickled)

    def missing(self) -> str:
        """Why the flow can't be planned yet, in words; empty when it can."""
        if self.workflow is None or self.model is None:
            return "it has not been observed yet"
        for stage in self.workflow.stages:
            verdict = self.model.identified(stage.name)
            if not verdict:
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
        return self.put(Knowledge.of(flow_name, SLOProfile.of_flow(flow_name)))

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


def forget(flow_name: str) -> None:
    """Have the profile read anew at the next run."""
    _REMEMBERED.forget(flow_name)


def _past(facts: Mapping[str, Any], latency_s: float) -> PastRun:
    predicted = facts.get("predicted_s")
    return PastRun(
        plan=str(facts.get("plan_digest") or ""),
        latency_s=latency_s,
        predicted_s=float(predicted) if isinstance(predicted, (int, float)) else math.nan,
        met=bool(facts.get("met", True)),
    )


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []

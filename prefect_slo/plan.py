"""What was decided: a stage plan for every stage, what it predicts, and what is certified about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from prefect_slo.errors import InvalidPlan, UnknownStage
from prefect_slo.resources import Option, Size
from prefect_slo.slo import Budget, Latency, Slo

SCHEMA = 1
Record = Literal["full", "summary", "bare"]


@dataclass(frozen=True)
class StagePlan:
    """How one stage is run.

    Attributes:
        workers: Workers that run it at once.
        size: Size of each.
        pool: Pool they run on.
        batch: Items in one call of a batched task.
        bundle: Items per dispatch to a worker; ``None`` lets the runner grow bundles from measured item times.
        record: ``full`` is a task run per item, ``summary`` one event per item, ``bare`` none.
        knobs: Values of the task's knobs.
    """

    workers: int = 1
    size: Size = Size(1, 1024)
    pool: str = "default"
    batch: int = 1
    bundle: int | None = None
    record: Record = "full"
    knobs: tuple[tuple[str, object], ...] = ()

    @classmethod
    def of(cls, option: Option, *, bundle: int | None = None, record: Record = "full") -> StagePlan:
        """The stage plan that runs a menu option."""
        return cls(option.workers, option.size, option.pool, option.batch, bundle, record, option.knobs)

    @property
    def option(self) -> Option:
        """The menu option that it runs."""
        return Option(self.workers, self.size, self.pool, self.batch, self.knobs)


@dataclass(frozen=True)
class Quantiles:
    """Summary of a predicted distribution."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Prediction:
    """What the plan predicts of one run, under the model.

    Attributes:
        latency_s: Latency.
        cost_usd: Cost.
        latency_at_percentile_s: Latency at the objective's own percentile.
        cost_at_percentile_usd: Cost at the objective's own percentile.
    """

    latency_s: Quantiles
    cost_usd: Quantiles
    latency_at_percentile_s: float
    cost_at_percentile_usd: float


@dataclass(frozen=True)
class Certificate:
    """What is certified about a plan, and how far it may be from the best.

    Attributes:
        lower_bound: No plan on the menu does better than this (mean US dollars for a latency bound, seconds at the
            percentile for a budget), for the sampled problem.
        gap: (objective of the plan − lower bound) / objective of the plan: the *search gap*.
        price_of_certainty: Relative extra over the best plan for the sampled problem at the nominal percentile.
        samples: Fresh samples that the plan was tested on.
        violations: How many of them broke the bound.
        confidence: That at least the percentile of runs keeps the bound, *under the model*.
        calibration_runs: Real runs behind the claim *in your runs*; 0 means that no such claim is made.
    """

    lower_bound: float
    gap: float
    price_of_certainty: float
    samples: int
    violations: int
    confidence: float
    calibration_runs: int = 0


@dataclass(frozen=True)
class Plan:
    """Stage plans, what they predict and what is certified. The same input and seed give the same bytes.

    Attributes:
        workflow: Name of the workflow it was made for.
        objective: What was asked.
        stages: Stage plans by stage name.
        predicted: Under the model.
        certificate: ``None`` for a plan that nobody certified (a baseline, a default).
        seed: Seed of every sample that led to it.
    """

    workflow: str
    objective: Slo | None
    stages: Mapping[str, StagePlan]
    predicted: Prediction | None = None
    certificate: Certificate | None = None
    seed: int = 0

    def __getitem__(self, stage: str) -> StagePlan:
        try:
            return self.stages[stage]
        except KeyError:
            raise UnknownStage(stage, tuple(self.stages)) from None

    def with_stage(self, stage: str, **changes: Any) -> Plan:
        """A copy with some fields of one stage plan replaced; its prediction and certificate no longer hold."""
        changed = {**self.stages, stage: replace(self[stage], **changes)}
        return replace(self, stages=changed, predicted=None, certificate=None)

    def to_document(self) -> dict[str, Any]:
        """The plan file as a document, in the order of its fields."""
        return {
            "schema": SCHEMA,
            "workflow": self.workflow,
            "objective": _objective_document(self.objective),
            "seed": self.seed,
            "stages": {name: _stage_document(stage) for name, stage in self.stages.items()},
            "predicted": asdict(self.predicted) if self.predicted else None,
            "certificate": asdict(self.certificate) if self.certificate else None,
        }

    def to_json(self) -> str:
        """The plan file: what ``Plan.from_json`` reads back to an equal plan."""
        return json.dumps(self.to_document(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan file.

        Raises:
            InvalidPlan: Not JSON, of another schema, or with fields that do not fit.
        """
        try:
            document = json.loads(text)
        except ValueError as error:
            raise InvalidPlan("plan", text[:40], f"JSON ({error})") from None
        return cls.from_document(document)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Plan:
        """Read a plan document; see ``from_json``."""
        if not isinstance(document, Mapping):
            raise InvalidPlan("plan", document, "an object")
        if document.get("schema") != SCHEMA:
            raise InvalidPlan("plan.schema", document.get("schema"), f"{SCHEMA}; make the plan again with this version")
        try:
            predicted, certificate = document.get("predicted"), document.get("certificate")
            return cls(
                workflow=document["workflow"],
                objective=_read_objective(document.get("objective")),
                stages={name: _read_stage(entry) for name, entry in document["stages"].items()},
                predicted=_read_prediction(predicted) if predicted else None,
                certificate=Certificate(**certificate) if certificate else None,
                seed=document.get("seed", 0),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidPlan("plan", f"{type(error).__name__}: {error}", "the fields of a plan file") from None


@dataclass(frozen=True)
class PlanChange:
    """One difference between two plans."""

    stage: str
    field: str
    before: object
    after: object


def diff(before: Plan, after: Plan) -> tuple[PlanChange, ...]:
    """What changes from one plan to another, stage by stage; a missing stage shows as ``None``."""
    changes = []
    for stage in dict.fromkeys([*before.stages, *after.stages]):
        old, new = before.stages.get(stage), after.stages.get(stage)
        if old is None or new is None:
            changes.append(PlanChange(stage, "stage", old, new))
            continue
        changes += [
            PlanChange(stage, name, getattr(old, name), getattr(new, name))
            for name in StagePlan.__dataclass_fields__
            if getattr(old, name) != getattr(new, name)
        ]
    return tuple(changes)


def _stage_document(stage: StagePlan) -> dict[str, Any]:
    return {
        "workers": stage.workers,
        "vcpus": stage.size.vcpus,
        "memory_mb": stage.size.memory_mb,
        "gpu": stage.size.gpu,
        "hardware": stage.size.hardware,
        "pool": stage.pool,
        "batch": stage.batch,
        "bundle": stage.bundle,
        "record": stage.record,
        "knobs": dict(stage.knobs),
    }


def _read_stage(entry: Mapping[str, Any]) -> StagePlan:
    fields = dict(entry)
    size = Size(fields.pop("vcpus"), fields.pop("memory_mb"), fields.pop("gpu", 0.0), fields.pop("hardware", "cpu"))
    knobs = tuple(sorted(fields.pop("knobs", {}).items()))
    if fields.get("record", "full") not in ("full", "summary", "bare"):
        raise InvalidPlan("record", fields["record"], "'full', 'summary' or 'bare'")
    return StagePlan(size=size, knobs=knobs, **fields)


def _read_prediction(entry: Mapping[str, Any]) -> Prediction:
    fields = dict(entry)
    latency, cost = Quantiles(**fields.pop("latency_s")), Quantiles(**fields.pop("cost_usd"))
    return Prediction(latency, cost, **fields)


def _objective_document(objective: Slo | None) -> dict[str, Any] | None:
    if objective is None:
        return None
    return {
        "latency_s": objective.latency.bound_s if objective.latency else None,
        "budget_usd": objective.budget.bound_usd if objective.budget else None,
        "percentile": objective.percentile,
        "confidence": objective.confidence,
    }


def _read_objective(entry: Mapping[str, Any] | None) -> Slo | None:
    if entry is None:
        return None
    at = (entry["percentile"], entry["confidence"])
    latency, budget = entry.get("latency_s"), entry.get("budget_usd")
    return Slo(Latency(latency, *at) if latency else None, Budget(budget, *at) if budget else None)

"""What was decided: a stage plan for every stage, what it predicts, and what is certified about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from prefect_slo.edges import EdgePlan
from prefect_slo.errors import InvalidPlan, UnknownStage
from prefect_slo.objective import Slo
from prefect_slo.resources import Option, Size, knob_value
from prefect_slo.units import finite, instances, items, text, whole

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
        knobs: Values of the task's knobs, as ``(name, value)`` pairs; kept sorted by name.

    Raises:
        InvalidValue: A field of another type, or outside what it may hold.
    """

    workers: int = 1
    size: Size = Size(1, 1024)
    pool: str = "default"
    batch: int = 1
    bundle: int | None = None
    record: Record = "full"
    knobs: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        for name in ("workers", "batch") if self.bundle is None else ("workers", "batch", "bundle"):
            object.__setattr__(self, name, whole(getattr(self, name), f"plan.{name}"))
        if not isinstance(self.size, Size):
            raise InvalidPlan("plan.size", self.size, "Size(...)")
        text(self.pool, "plan.pool")
        if self.record not in ("full", "summary", "bare"):
            raise InvalidPlan("plan.record", self.record, "'full', 'summary' or 'bare'")
        object.__setattr__(self, "knobs", _knobs(self.knobs))

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

    def __post_init__(self) -> None:
        _make_finite(self, "predicted", "mean", "p50", "p95", "p99")


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

    def __post_init__(self) -> None:
        for name in ("latency_s", "cost_usd"):
            if not isinstance(getattr(self, name), Quantiles):
                raise InvalidPlan(f"predicted.{name}", getattr(self, name), "Quantiles(...)")
        _make_finite(self, "predicted", "latency_at_percentile_s", "cost_at_percentile_usd")


@dataclass(frozen=True)
class Certificate:
    """What is certified about a plan, and how far it may be from the best.

    Attributes:
        lower_bound: No plan on the menu that promises as much does better than this (mean US dollars for a latency
            bound, seconds at the percentile for a budget): for the sampled problem, its bounds tightened by the room
            that the promise takes.
        gap: (objective of the plan − lower bound) / objective of the plan: the *search gap*.
        price_of_certainty: Relative extra over the best plan for the sampled problem with its bounds as they were asked
            for, at the nominal percentile: what promising costs.
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

    def __post_init__(self) -> None:
        _make_finite(self, "certificate", "lower_bound", "gap", "price_of_certainty", "confidence")
        for name in ("samples", "violations", "calibration_runs"):
            object.__setattr__(self, name, whole(getattr(self, name), f"certificate.{name}", least=0))


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
        passing: How data passes, by edge; empty where nothing was planned of it.
    """

    workflow: str
    objective: Slo | None
    stages: Mapping[str, StagePlan]
    predicted: Prediction | None = None
    certificate: Certificate | None = None
    seed: int = 0
    passing: tuple[EdgePlan, ...] = ()

    def __post_init__(self) -> None:
        text(self.workflow, "plan.workflow")
        for name, kind in (("objective", Slo), ("predicted", Prediction), ("certificate", Certificate)):
            if not isinstance(getattr(self, name), (kind, type(None))):
                raise InvalidPlan(f"plan.{name}", getattr(self, name), f"{kind.__name__}(...) or None")
        if not isinstance(self.stages, Mapping):
            raise InvalidPlan("plan.stages", self.stages, "stage plans by stage name")
        for stage, plan in self.stages.items():
            if not isinstance(plan, StagePlan):
                raise InvalidPlan(f"plan.stages.{text(stage, 'plan.stages')}", plan, "StagePlan(...)")
        object.__setattr__(self, "seed", whole(self.seed, "plan.seed", least=0))
        object.__setattr__(self, "passing", instances(EdgePlan, self.passing, "plan.passing"))

    def __getitem__(self, stage: str) -> StagePlan:
        try:
            return self.stages[stage]
        except (KeyError, TypeError):
            raise UnknownStage(stage, tuple(self.stages)) from None

    def with_stage(self, stage: str, **changes: Any) -> Plan:
        """A copy with some fields of one stage plan replaced; what was predicted, certified and passed no longer holds.

        Raises:
            UnknownStage: The plan has no such stage.
            InvalidValue: No such field, or a value that it can't hold.
        """
        for name in changes:
            if name not in StagePlan.__dataclass_fields__:
                raise InvalidPlan("plan", name, f"one of {', '.join(StagePlan.__dataclass_fields__)}")
        changed = {**self.stages, stage: replace(self[stage], **changes)}
        return replace(self, stages=changed, predicted=None, certificate=None, passing=())

    def to_document(self) -> dict[str, Any]:
        """The plan file as a document, in the order of its fields."""
        from prefect_slo import plan_document

        return plan_document.write(self)

    def to_json(self) -> str:
        """The plan file: what ``Plan.from_json`` reads back to an equal plan."""
        return json.dumps(self.to_document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan file.

        Raises:
            InvalidValue: Not JSON, of another schema, or with fields that do not fit.
        """
        try:
            document = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidPlan("plan", text, f"JSON ({error})") from None
        return cls.from_document(document)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Plan:
        """Read a plan document; see ``from_json``."""
        from prefect_slo import plan_document

        return plan_document.read(document)


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


def _make_finite(value: object, where: str, *names: str) -> None:
    """Turn these fields of a frozen value into finite floats, so that equal values print the same bytes."""
    for name in names:
        object.__setattr__(value, name, finite(getattr(value, name), f"{where}.{name}"))


def _knobs(pairs: object) -> tuple[tuple[str, object], ...]:
    read = []
    for pair in items(pairs, "plan.knobs"):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InvalidPlan("plan.knobs", pair, "pairs of a name and a value")
        read.append((text(pair[0], "plan.knobs"), knob_value(pair[1], f"plan.knobs.{pair[0]}")))
    return tuple(sorted(read, key=lambda pair: pair[0]))

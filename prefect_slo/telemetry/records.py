"""What is kept of one run: its stages, its invocations, how it ended, and what had been planned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from prefect_slo.errors import InvalidObservation
from prefect_slo.observation import Invocation, StageRun
from prefect_slo.telemetry.packing import pack, unpack

SCHEMA = 1
_Row = TypeVar("_Row", Invocation, StageRun)
_DEFAULTS: dict[type[Any], dict[str, Any]] = {
    kind: {f.name: None if f.default is MISSING else f.default for f in fields(kind)} for kind in (Invocation, StageRun)
}
Status = Literal["completed", "failed", "crashed", "cancelled", "timed_out", "cached"]


@dataclass(frozen=True, order=True)
class StageKey:
    """What a stage model is kept under, in whatever flow the task is used.

    Attributes:
        task_key: Prefect's task key without its code hash.
        source_hash: Hash of the task's code: the version of the model.
        hardware: Open name of the kind of machine that the rows were measured on.
    """

    task_key: str
    source_hash: str = ""
    hardware: str = "cpu"

    @property
    def code(self) -> tuple[str, str]:
        """Task and version, for any hardware."""
        return self.task_key, self.source_hash


@dataclass(frozen=True)
class StageRecord:
    """One stage of one run, whether or not it may train a model.

    Attributes:
        row: What was measured.
        key: What its model is kept under.
        status: How the stage ended; ``cached`` when any of its results came from a cache.
        knobs: Values of the task's knobs, JSON scalars by name.
        features: What is known of the input (its size, …), JSON scalars by name.
    """

    row: StageRun
    key: StageKey
    status: Status = "completed"
    knobs: Mapping[str, Any] = field(default_factory=dict)
    features: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_status(self.status)


@dataclass(frozen=True)
class RunRecord:
    """One run of a flow, as it is stored.

    Attributes:
        flow: Name of the flow.
        run_id: Flow-run id; with ``#2``, ``#3``, … appended for later attempts of the same flow run.
        status: How the run ended; ``crashed`` where nothing says so.
        latency_s: Entry to return on a monotonic clock; ``nan`` where unknown.
        started_at: Unix time.
        stages: Stage runs in the order in which they ended.
        invocations: What ran on each worker; a sample of them where there were very many.
        workflow: The stage graph that the run showed, as a workflow document; ``None`` before the first call.
        facts: Everything else: objective, plan, prediction, mode, versions, machine.
        source: ``run`` for a run by this package, ``history`` for one found in Prefect's own records; anything else
            names another flow that the rows were taken from, and then latency and branches say nothing about this one.
    """

    flow: str
    run_id: str
    status: Status
    latency_s: float = math.nan
    started_at: float = math.nan
    stages: tuple[StageRecord, ...] = ()
    invocations: tuple[Invocation, ...] = ()
    workflow: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    source: str = "run"

    def __post_init__(self) -> None:
        check_status(self.status)

    @property
    def own(self) -> bool:
        """Whether it is a run of this flow, and not rows from elsewhere."""
        return self.source in ("run", "history")

    @property
    def training(self) -> tuple[StageRecord, ...]:
        """The stage runs that a model may learn from: completed ones of a completed run."""
        if self.status != "completed":
            return ()
        return tuple(stage for stage in self.stages if stage.status == "completed")

    def to_document(self) -> dict[str, Any]:
        """The record as JSON, fields at their default left out, what is bulky packed."""
        document = {
            "schema": SCHEMA,
            "flow": self.flow,
            "run_id": self.run_id,
            "status": self.status,
            "source": self.source,
            "stages": [stage_document(stage) for stage in self.stages],
            "facts": dict(self.facts),
        }
        for name in ("latency_s", "started_at"):
            if math.isfinite(getattr(self, name)):
                document[name] = getattr(self, name)
        if self.invocations:
            document["invocations"] = pack([compact(invocation) for invocation in self.invocations])
        if self.workflow is not None:
            document["workflow"] = pack(self.workflow)
        return document

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> RunRecord:
        """Read a record.

        Raises:
            InvalidObservation: Another schema, or fields that do not fit.
        """
        if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
            shown = document.get("schema") if isinstance(document, Mapping) else document
            raise InvalidObservation("telemetry.schema", shown, f"{SCHEMA}; a newer version of this package wrote it")
        try:
            invocations = unpack(document["invocations"]) if "invocations" in document else ()
            return cls(
                flow=document["flow"],
                run_id=document["run_id"],
                status=document["status"],
                latency_s=document.get("latency_s", math.nan),
                started_at=document.get("started_at", math.nan),
                stages=tuple(read_stage(entry) for entry in document["stages"]),
                invocations=tuple(expand(Invocation, entry) for entry in invocations),
                workflow=unpack(document["workflow"]) if "workflow" in document else None,
                facts=document.get("facts", {}),
                source=document.get("source", "run"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InvalidObservation("telemetry", reason, "the fields of a run record") from None


def check_status(status: str) -> None:
    """Raises ``InvalidObservation`` unless ``status`` is one that a run or a stage can end in."""
    if status not in get_args(Status):
        raise InvalidObservation("status", status, f"one of {', '.join(get_args(Status))}")


def stage_document(stage: StageRecord) -> dict[str, Any]:
    """A stage record as JSON."""
    document: dict[str, Any] = {"row": compact(stage.row), "key": [*stage.key.code, stage.key.hardware]}
    if stage.status != "completed":
        document["status"] = stage.status
    for name in ("knobs", "features"):
        if content := getattr(stage, name):
            document[name] = dict(content)
    return document


def read_stage(document: Mapping[str, Any]) -> StageRecord:
    """The stage record that ``stage_document`` wrote."""
    rest = {name: document[name] for name in ("status", "knobs", "features") if name in document}
    return StageRecord(expand(StageRun, document["row"]), StageKey(*document["key"]), **rest)


def compact(value: Invocation | StageRun) -> dict[str, Any]:
    """Fields that say something: not at their default, not NaN, not infinite."""
    defaults = _DEFAULTS[type(value)]
    return {
        name: content
        for name, content in value.__dict__.items()
        if content != defaults[name] and not (isinstance(content, float) and not math.isfinite(content))
    }


def expand(kind: type[_Row], document: Mapping[str, Any]) -> _Row:
    """The value that ``compact`` shortened; fields of newer versions are ignored."""
    known = _DEFAULTS[kind]
    return kind(**{name: content for name, content in document.items() if name in known})

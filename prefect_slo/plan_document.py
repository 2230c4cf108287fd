"""Plan files: the form that ``docs/reference/files.md`` describes, read and written.

Values are checked where they become values (``StagePlan``, ``Quantiles``, ``Slo``); here only the form of the
document is: which fields there are, and which of them must be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from prefect_slo.edges import EdgePlan, Way
from prefect_slo.errors import InvalidPlan
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.plan import Certificate, Plan, Prediction, Quantiles, StagePlan
from prefect_slo.resources import Size

SCHEMA = 1
"""Version of the plan file; a file of another version is refused."""

_PLAN = ("schema", "workflow", "objective", "seed", "stages", "predicted", "certificate", "passing", "timing")
_SIZE = tuple(part.name for part in fields(Size))
_OBJECTIVE = ("latency_s", "budget_usd", "percentile", "confidence")


def write(plan: Plan) -> dict[str, Any]:
    """The document that ``read`` turns into an equal plan, in the order of its fields."""
    return {
        "schema": SCHEMA,
        "workflow": plan.workflow,
        "objective": _objective_document(plan.objective),
        "seed": plan.seed,
        "stages": {name: _stage_document(stage) for name, stage in plan.stages.items()},
        "predicted": asdict(plan.predicted) if plan.predicted else None,
        "certificate": asdict(plan.certificate) if plan.certificate else None,
        **({"passing": [_edge_document(edge) for edge in plan.passing]} if plan.passing else {}),
    }


def read(document: Mapping[str, Any]) -> Plan:
    """A plan from a parsed document; ``timing``, which the command line prints beside a plan, is passed over.

    Raises:
        InvalidValue: Another schema, unknown or missing fields, or values outside what they may hold.
    """
    if isinstance(document, Mapping) and document.get("schema") != SCHEMA:
        raise InvalidPlan("plan.schema", document.get("schema"), f"{SCHEMA}; make the plan again with this version")
    _fields(document, _PLAN, ("workflow", "stages"), "plan")
    stages, predicted, certificate = document["stages"], document.get("predicted"), document.get("certificate")
    if not isinstance(stages, Mapping):
        raise InvalidPlan("plan.stages", stages, "an object of stage plans by stage name")
    return Plan(
        workflow=document["workflow"],
        objective=_read_objective(document.get("objective")),
        stages={name: _read_stage(entry, f"plan.stages.{name}") for name, entry in stages.items()},
        predicted=None if predicted is None else _read_prediction(predicted),
        certificate=None if certificate is None else _build(Certificate, certificate, "plan.certificate"),
        seed=document.get("seed", 0),
        passing=_read_passing(document.get("passing", [])),
    )


def _stage_document(stage: StagePlan) -> dict[str, Any]:
    return {
        "workers": stage.workers,
        **{name: getattr(stage.size, name) for name in _SIZE if name != "gpu_memory_mb" or stage.size.gpu_memory_mb},
        "pool": stage.pool,
        "batch": stage.batch,
        "bundle": stage.bundle,
        "record": stage.record,
        "knobs": dict(stage.knobs),
    }


def _read_stage(entry: object, where: str) -> StagePlan:
    known = tuple(part.name for part in fields(StagePlan) if part.name != "size")
    read = _fields(entry, (*known, *_SIZE), ("vcpus", "memory_mb"), where)
    knobs = read.get("knobs", {})
    if not isinstance(knobs, Mapping):
        raise InvalidPlan(f"{where}.knobs", knobs, "an object of knob values")
    size = Size(**{name: read[name] for name in _SIZE if name in read})
    rest = {name: read[name] for name in known if name in read and name != "knobs"}
    return StagePlan(size=size, knobs=tuple(knobs.items()), **rest)


def _edge_document(edge: EdgePlan) -> dict[str, Any]:
    return {
        "source": edge.source,
        "sink": edge.sink,
        **asdict(edge.chosen),
        "size_mb": edge.size_mb,
        "broadcast": edge.broadcast,
        "others": [asdict(way) for way in edge.others],
        "why": edge.why,
    }


def _read_passing(entries: object) -> tuple[EdgePlan, ...]:
    where = "plan.passing"
    if not isinstance(entries, list):
        raise InvalidPlan(where, entries, "a list of edges")
    way = tuple(part.name for part in fields(Way))
    rest = ("size_mb", "broadcast", "why")
    read = []
    for entry in entries:
        found = _fields(entry, ("source", "sink", *way, "others", *rest), ("source", "sink", *way), where)
        others = found.get("others", [])
        if not isinstance(others, list):
            raise InvalidPlan(f"{where}.others", others, "a list of ways")
        read.append(
            EdgePlan(
                found["source"],
                found["sink"],
                Way(**{name: found[name] for name in way}),
                others=tuple(_build(Way, other, f"{where}.others") for other in others),
                **{name: found[name] for name in rest if name in found},
            )
        )
    return tuple(read)


def _read_prediction(entry: object) -> Prediction:
    where = "plan.predicted"
    read = dict(_fields(entry, *_signature(Prediction), where))
    for name in ("latency_s", "cost_usd"):
        read[name] = _build(Quantiles, read[name], f"{where}.{name}")
    return Prediction(**read)


def _objective_document(objective: Slo | None) -> dict[str, Any] | None:
    if objective is None:
        return None
    return {
        "latency_s": objective.latency.bound_s if objective.latency else None,
        "budget_usd": objective.budget.bound_usd if objective.budget else None,
        "percentile": objective.percentile,
        "confidence": objective.confidence,
    }


def _read_objective(entry: object) -> Slo | None:
    if entry is None:
        return None
    read = _fields(entry, _OBJECTIVE, ("percentile", "confidence"), "plan.objective")
    at = (read["percentile"], read["confidence"])
    latency, budget = read.get("latency_s"), read.get("budget_usd")
    return Slo(None if latency is None else Latency(latency, *at), None if budget is None else Budget(budget, *at))


def _build(kind: type[Any], entry: object, where: str) -> Any:
    return kind(**_fields(entry, *_signature(kind), where))


def _signature(kind: type[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of all fields of a dataclass, and of those without a default."""
    parts = fields(kind)
    return tuple(p.name for p in parts), tuple(p.name for p in parts if p.default is MISSING)


def _fields(entry: object, known: tuple[str, ...], required: tuple[str, ...], where: str) -> Mapping[str, Any]:
    """``entry`` when it is an object with all of ``required`` and nothing but ``known``."""
    if not isinstance(entry, Mapping):
        raise InvalidPlan(where, entry, "an object")
    for name in entry:
        if name not in known:
            raise InvalidPlan(f"{where}.{name}", entry[name], f"one of the fields {', '.join(known)}")
    for name in required:
        if name not in entry:
            raise InvalidPlan(f"{where}.{name}", None, "to be in the plan")
    return entry

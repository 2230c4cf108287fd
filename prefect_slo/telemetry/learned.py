"""What a ledger says about the flow: its workflow, and the rows that each stage's model is fitted to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from prefect_slo.telemetry.fold import Observations, table
from prefect_slo.telemetry.ledger import Code, Ledger, Measured, Setting, row_order
from prefect_slo.telemetry.records import StageRecord
from prefect_slo.workflow import Workflow

ENOUGH_SETTINGS = 4
QUEUED_SHARE = 0.02
"""A run that waited for other runs' capacity for more than 2 % of its latency says nothing of its own latency."""


@dataclass(frozen=True)
class Coverage:
    """How well a stage is known.

    Attributes:
        rows: Rows that its model would be fitted to.
        settings: Different settings among them.
        borrowed: How many of the rows were measured elsewhere: in another flow, or at another place of this one.
    """

    rows: int
    settings: int
    borrowed: int


def workflow_of(ledger: Ledger, name: str) -> Workflow | None:
    """The flow's graph as its runs showed it, ``None`` before the first completed run.

    A stage belongs to it when one of the completed runs that are kept ran it. With ``n(A)`` the number of these runs in
    which all of ``A`` ran, the probability of stage ``s`` with parents ``P`` is ``n(P ∪ {s}) / n(P)``; its number of
    items is the median of its rows'.
    """
    runs = [frozenset(run.ran) for run in ledger.completed() if run.ran]
    stages = {stage for ran in runs for stage in ran if stage in ledger.places}
    if not stages:
        return None
    ordered = sorted(stages, key=lambda stage: (ledger.places[stage].position, stage))
    documents = [_stage(ledger, stage, stages, runs) for stage in ordered]
    constraints = ledger.frame[1].get("constraints", []) if ledger.frame else []
    document: dict[str, Any] = {
        "name": name,
        "stages": documents,
        "constraints": [text for text in constraints if _concerns(text, stages, ledger)],
    }
    if ledger.frame and "capacity" in ledger.frame[1]:
        document["capacity"] = ledger.frame[1]["capacity"]
    return Workflow.from_document(document)


def observations_of(ledger: Ledger, workflow: Workflow) -> Observations:
    """What the workflow's model is fitted to: rows of each stage at its newest code, in a fixed order.

    A stage takes rows of the same code under another name, too (a stage was put before it, or the rows come from
    another flow); as long as these have fewer than ``ENOUGH_SETTINGS`` settings, those of its other places as well.
    Latencies are of the runs that have a row for each stage that they ran and did not wait for other runs' capacity; of
    others, the time outside their stages would come out too long.
    """
    rows = [record for stage in workflow.stages for record in training_rows(ledger, stage.name, workflow)]
    kept: dict[str, set[str]] = {}
    queued_s: dict[str, float] = {}
    for record in rows:
        run_id, waited_s = record.row.run_id, record.row.queue_s
        kept.setdefault(run_id, set()).add(record.row.stage)
        queued_s[run_id] = queued_s.get(run_id, 0.0) + (0.0 if math.isnan(waited_s) else waited_s)
    latencies = {
        run.order.run_id: run.latency_s
        for run in ledger.completed()
        if math.isfinite(run.latency_s)
        and {s for s in run.ran if s in workflow} == kept.get(run.order.run_id)
        and queued_s[run.order.run_id] <= QUEUED_SHARE * run.latency_s
    }
    return Observations(table(rows), tuple(record.key for record in rows), latencies)


def training_rows(ledger: Ledger, stage: str, workflow: Workflow) -> tuple[StageRecord, ...]:
    """The rows of one stage, oldest first.

    Rows that were measured elsewhere are renamed to it, and their runs to ``<run>@<stage>``: runs of their own.
    """
    code = current_code(ledger, stage)
    if code is None:
        return ()
    same = [other for other in ledger.groups if other[1:] == code[1:]]
    free = [other for other in same if other.stage == stage or other.stage not in workflow]
    chosen = free if len({setting for other in free for setting in ledger.groups[other]}) >= ENOUGH_SETTINGS else same
    rows = sorted((r for c in chosen for m in ledger.groups[c].values() for r in m.rows), key=row_order)
    return tuple(record if record.row.stage == stage else _moved(record, stage) for record in rows)


def coverage(ledger: Ledger, workflow: Workflow) -> Mapping[str, Coverage]:
    """How well each stage of the workflow is known."""
    covered = {}
    for stage in workflow.stages:
        rows = training_rows(ledger, stage.name, workflow)
        own = ledger.groups.get(current_code(ledger, stage.name) or Code("", "", ""), {})
        settings = {(r.row.workers, r.row.memory_mb, r.row.vcpus, r.row.batch, r.row.hardware) for r in rows}
        covered[stage.name] = Coverage(len(rows), len(settings), len(rows) - sum(len(m.rows) for m in own.values()))
    return covered


def measured(ledger: Ledger, stage: str) -> Mapping[Setting, Measured]:
    """What is known of a stage's newest code by setting, with sums over the rows that were dropped, too."""
    code = current_code(ledger, stage)
    return ledger.groups.get(code, {}) if code is not None else {}


def current_code(ledger: Ledger, stage: str) -> Code | None:
    """The newest version of a stage's code, ``None`` for a stage that never completed."""
    own = [code for code in ledger.groups if code.stage == stage]
    return max(own, key=lambda code: (ledger.newest(code), code), default=None)


def _moved(record: StageRecord, stage: str) -> StageRecord:
    return replace(record, row=replace(record.row, stage=stage, run_id=f"{record.row.run_id}@{record.row.stage}"))


def _stage(ledger: Ledger, stage: str, stages: set[str], runs: list[frozenset[str]]) -> dict[str, Any]:
    document = dict(ledger.places[stage].document)
    for name in ("after", "after_items"):
        if name in document:
            document[name] = [parent for parent in document[name] if parent in stages]
    parents = {*document.get("after", ()), *document.get("after_items", ())}
    led_here = [ran for ran in runs if parents <= ran] or runs
    probability = sum(stage in ran for ran in led_here) / len(led_here)
    document.pop("probability", None)
    if 0 < probability < 1:
        document["probability"] = round(probability, 4)
    items = [r.row.items for m in measured(ledger, stage).values() for r in m.rows if r.row.items > 0]
    if items:
        document["items"] = int(median(items))
    return document


def _concerns(text: str, stages: set[str], ledger: Ledger) -> bool:
    """Whether a constraint speaks only of stages that the workflow has."""
    return not any(f"{gone}." in text for gone in ledger.places if gone not in stages)

"""A ledger as a compact JSON document: strings once, rows as columns, columns that say nothing left out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from prefect_slo.errors import InvalidObservation
from prefect_slo.observation import StageRun
from prefect_slo.telemetry.ledger import (
    FLOATS,
    Code,
    Ledger,
    Measured,
    Moments,
    Order,
    Place,
    RunSummary,
    Setting,
)
from prefect_slo.telemetry.records import StageKey, StageRecord

SCHEMA = 1


def ledger_document(ledger: Ledger) -> dict[str, Any]:
    """The ledger as JSON; equal ledgers give equal documents."""
    runs = sorted(ledger.runs.values(), key=lambda run: run.order)
    ids = {run.order.run_id for run in runs}
    ids |= {r.row.run_id for g in ledger.groups.values() for m in g.values() for r in m.rows}
    index = {run_id: i for i, run_id in enumerate(sorted(ids))}
    stages = sorted({name for run in runs for name in run.ran})
    return {
        "schema": SCHEMA,
        "ids": sorted(ids),
        "stages": stages,
        "runs": {
            "id": [index[run.order.run_id] for run in runs],
            "started": _deltas([run.order.started for run in runs]),
            "status": [run.status for run in runs],
            "latency_s": [_null(run.latency_s) for run in runs],
            "ran": [[stages.index(name) for name in run.ran] for run in runs],
            "facts": [dict(run.facts) for run in runs],
        },
        "places": {name: [*place.order, place.position, place.document] for name, place in ledger.places.items()},
        "groups": [_group(code, ledger.groups[code], index) for code in sorted(ledger.groups)],
        "frame": [*ledger.frame[0], ledger.frame[1]] if ledger.frame else None,
        "row_budget": ledger.row_budget,
    }


def read_ledger(document: Mapping[str, Any], retired: Sequence[str] = ()) -> Ledger:
    """The ledger that ``ledger_document`` wrote.

    Raises:
        InvalidObservation: Another schema, or fields that do not fit.
    """
    if document.get("schema") != SCHEMA:
        raise InvalidObservation("ledger.schema", document.get("schema"), f"{SCHEMA}; rebuild the profile")
    try:
        ids, frame = document["ids"], document["frame"]
        runs = _read_runs(document["runs"], ids, document["stages"])
        return Ledger(
            runs={run.order.run_id: run for run in runs},
            places={n: Place(Order(at, run), position, d) for n, (at, run, position, d) in document["places"].items()},
            groups={Code(*entry["code"]): _read_group(entry, ids) for entry in document["groups"]},
            frame=(Order(frame[0], frame[1]), frame[2]) if frame else None,
            row_budget=document["row_budget"],
            retired=frozenset(retired),
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InvalidObservation("ledger", reason, "the fields of a ledger; rebuild the profile") from None


def _read_runs(columns: Mapping[str, Any], ids: Sequence[str], stages: Sequence[str]) -> list[RunSummary]:
    started = _sums(columns["started"])
    rest = zip(columns["id"], columns["status"], columns["latency_s"], columns["ran"], columns["facts"], strict=True)
    return [
        RunSummary(Order(at, ids[i]), status, _nan(latency), tuple(stages[j] for j in ran), facts)
        for at, (i, status, latency, ran, facts) in zip(started, rest, strict=True)
    ]


def _group(code: Code, group: Mapping[Setting, Measured], index: Mapping[str, int]) -> dict[str, Any]:
    settings = sorted(group)
    rows = [(i, record) for i, setting in enumerate(settings) for record in group[setting].rows]
    columns: dict[str, list[Any]] = {
        "setting": [i for i, _ in rows],
        "run": [index[record.row.run_id] for _, record in rows],
        "at": _deltas([-1 if math.isnan(r.row.started_at) else int(r.row.started_at) for _, r in rows]),
        "items": [record.row.items for _, record in rows],
        "cold": [int(record.row.cold) for _, record in rows],
        **{name: [_null(getattr(record.row, name)) for _, record in rows] for name in FLOATS},
    }
    features = sorted({name for _, record in rows for name in record.features})
    return {
        "code": list(code),
        "settings": [[*setting, *astuple(group[setting].moments)] for setting in settings],
        "rows": {name: column for name, column in columns.items() if any(value not in (None, 0) for value in column)},
        "features": {name: [record.features.get(name) for _, record in rows] for name in features},
        "n": len(rows),
    }


def _read_group(entry: Mapping[str, Any], ids: Sequence[str]) -> dict[Setting, Measured]:
    code, n, columns = Code(*entry["code"]), entry["n"], entry["rows"]
    width = len(Setting._fields)
    settings = [Setting(*values[:width]) for values in entry["settings"]]
    moments = [Moments(*values[width:]) for values in entry["settings"]]
    started = _sums(columns["at"]) if "at" in columns else [0] * n
    kept: list[list[StageRecord]] = [[] for _ in settings]
    for i in range(n):
        which = columns["setting"][i] if "setting" in columns else 0
        setting = settings[which]
        floats = {name: _nan(columns[name][i]) for name in FLOATS if name in columns}
        row = StageRun(
            run_id=ids[columns["run"][i] if "run" in columns else 0],
            stage=code.stage,
            workers=setting.workers,
            memory_mb=setting.memory_mb,
            vcpus=setting.vcpus,
            hardware=setting.hardware,
            batch=setting.batch,
            items=columns["items"][i] if "items" in columns else 0,
            cold=bool(columns["cold"][i]) if "cold" in columns else False,
            started_at=float(started[i]) if started[i] >= 0 else math.nan,
            **floats,
        )
        features = {name: column[i] for name, column in entry["features"].items() if column[i] is not None}
        key = StageKey(code.task_key, code.source_hash, setting.hardware)
        kept[which].append(StageRecord(row, key, "completed", json.loads(setting.knobs), features))
    return {setting: Measured(m, tuple(rows)) for setting, m, rows in zip(settings, moments, kept, strict=True)}


def _deltas(values: Sequence[int]) -> list[int]:
    return [value - before for before, value in zip([0, *values], values, strict=False)]


def _sums(deltas: Sequence[int]) -> list[int]:
    total, values = 0, []
    for delta in deltas:
        total += delta
        values.append(total)
    return values


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)

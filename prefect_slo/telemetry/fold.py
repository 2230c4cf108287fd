"""From run records to the table that models are fitted to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefect_slo.observation import StageRuns
from prefect_slo.telemetry.records import RunRecord, StageKey, StageRecord


@dataclass(frozen=True)
class Observations:
    """What a workflow model is fitted to.

    Attributes:
        stage_runs: Rows of ``n`` completed stage runs of completed runs; knobs and features are extra columns.
        keys: The ``n`` keys that the rows' models are kept under.
        run_latency_s: Latency by run id, of completed runs of the flow itself.
    """

    stage_runs: StageRuns
    keys: tuple[StageKey, ...]
    run_latency_s: Mapping[str, float]


def fold(records: Iterable[RunRecord]) -> Observations:
    """The rows of records that may train a model, and the latency of their runs.

    Failed, crashed, cancelled, timed-out and cached stage runs, and all of runs that did not complete, are left out.
    """
    records = tuple(records)
    stages = [stage for record in records for stage in record.training]
    latencies = {
        record.run_id: record.latency_s
        for record in records
        if record.status == "completed" and record.own and math.isfinite(record.latency_s)
    }
    return Observations(table(stages), tuple(stage.key for stage in stages), latencies)


def table(stages: Sequence[StageRecord]) -> StageRuns:
    """Stage records as a stage-run table, knobs and features as extra columns (``None`` where a row has none)."""
    runs = StageRuns.of(stage.row for stage in stages)
    extras = [{**stage.features, **stage.knobs} for stage in stages]
    names = sorted({name for extra in extras for name in extra})
    return StageRuns(runs.columns, {name: _column([extra.get(name) for extra in extras]) for name in names})


def _column(values: list[Any]) -> NDArray[Any]:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column

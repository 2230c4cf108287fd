"""From invocations to stage runs, and from run records to the table that models are fitted to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefect_slo.errors import InvalidObservation
from prefect_slo.observation import Invocation, StageRun, StageRuns
from prefect_slo.resources import Size
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


def summarise(
    invocations: Sequence[Invocation],
    *,
    run_id: str,
    workers: int,
    size: Size,
    wall_s: float,
    batch: int = 1,
    cost_usd: float = math.nan,
    started_at: float = math.nan,
) -> StageRun:
    """The stage run that the invocations of one stage add up to.

    With busy time ``b_w`` = read + compute + write of worker ``w`` of ``d`` workers:
    ``overhead_s = wall_s − (Σ_w b_w) / d``, what the workers of the stage spent waiting for work, for one another and
    for their start. Invocations whose worker was lost or whose items failed count with the time that they took.

    Args:
        invocations: All of one stage, at least one.
        run_id: Name of the run.
        workers: Workers that were held for it.
        size: Size of each.
        wall_s: First item ready to last item done.
        batch: Items in one call.
        cost_usd: What the workers cost, lease start to release.
        started_at: Unix time of its first item.

    Raises:
        InvalidObservation: No invocation, or invocations of several stages.
    """
    stages = {invocation.stage for invocation in invocations}
    if len(stages) != 1:
        raise InvalidObservation("invocations", sorted(stages), "the invocations of exactly one stage")
    read, compute, write = (
        sum(getattr(invocation, name) for invocation in invocations) / workers
        for name in ("read_s", "compute_s", "write_s")
    )
    return StageRun(
        run_id=run_id,
        stage=stages.pop(),
        workers=workers,
        memory_mb=size.memory_mb,
        vcpus=size.vcpus,
        wall_s=wall_s,
        overhead_s=max(0.0, wall_s - read - compute - write),
        read_s=read,
        compute_s=compute,
        write_s=write,
        items=sum(invocation.items for invocation in invocations),
        batch=batch,
        bytes_in=float(sum(invocation.bytes_in for invocation in invocations)),
        bytes_out=float(sum(invocation.bytes_out for invocation in invocations)),
        cold=any(invocation.cold for invocation in invocations),
        cost_usd=cost_usd,
        peak_memory_mb=max(invocation.peak_memory_mb for invocation in invocations),
        hardware=size.hardware,
        started_at=started_at,
    )


def _column(values: list[Any]) -> NDArray[Any]:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column

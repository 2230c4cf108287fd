"""What is known of one flow from all of its runs, bounded in size.

A ledger is a function of the *set* of run records that it has absorbed: their order, and whether they came one by one
or all at once, makes no difference, so that a profile that grew run by run and one that is rebuilt from the API are
equal. Everything it keeps is therefore either an exact (integer) sum or "the newest k of" something, with a k that
never grows.

- of every run of the flow, the newest ``RUNS``: how it ended, its latency, which stages ran;
- of every stage, its place in the graph as its newest run showed it;
- of every stage and version of its code, by setting (workers, size, batch, knobs): how many rows there were, sums and
  sums of squares of the logarithms of wall and busy time, and the newest rows. The row budget is shared evenly among
  stages and, in a stage, filled like water: settings with few rows keep all of them, the busiest ones give way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from prefect_slo.telemetry.packing import canonical, digest
from prefect_slo.telemetry.records import RunRecord, StageRecord

ROWS = 800  # 69 bytes a row once packed: 55 kB of a block's 100 kB, the rest is for the model and the plan
RUNS = 200
VERSIONS = 2  # of a stage's code: the one in force and the one before
GROUPS = 64
LOG_SCALE = 10_000  # logarithms of seconds are summed as integers: exact in any order, to 0.01 %


class Order(NamedTuple):
    """Which of two runs is the newer: by start (Unix seconds), then by id."""

    started: int
    run_id: str


class Code(NamedTuple):
    """A stage of this flow, or of another one that rows were taken from, at one version of its code."""

    stage: str
    task_key: str
    source_hash: str


class Setting(NamedTuple):
    """What a stage was run with."""

    workers: int
    memory_mb: float
    vcpus: float
    hardware: str
    batch: int
    knobs: str = "{}"


@dataclass(frozen=True)
class Moments:
    """Exact sums over all rows of a setting, kept and dropped, in units of 1/``LOG_SCALE``.

    Attributes:
        rows: How many there were.
        wall: Σ ln(wall time).
        wall_squared: Σ ln²(wall time).
        busy: Σ ln(wall time − overhead); wall time where the overhead is unknown.
        busy_squared: Σ ln²(busy time).
    """

    rows: int = 0
    wall: int = 0
    wall_squared: int = 0
    busy: int = 0
    busy_squared: int = 0

    def plus(self, record: StageRecord) -> Moments:
        wall = _log(record.row.wall_s)
        overhead = record.row.overhead_s
        busy = wall if math.isnan(overhead) else _log(record.row.wall_s - overhead)
        return Moments(
            self.rows + 1, self.wall + wall, self.wall_squared + wall**2, self.busy + busy, self.busy_squared + busy**2
        )

    @property
    def median_wall_s(self) -> float:
        """exp of the mean logarithm: the median where the noise is log-normal."""
        return math.exp(self.wall / self.rows / LOG_SCALE)


@dataclass(frozen=True)
class Measured:
    """What is known of a stage at one setting: sums over all rows, and the newest of them."""

    moments: Moments = Moments()
    rows: tuple[StageRecord, ...] = ()


@dataclass(frozen=True)
class RunSummary:
    """How one run of the flow ended.

    Attributes:
        order: When it started, and its id.
        status: How it ended.
        latency_s: ``nan`` where unknown.
        ran: Stages that ran (or came from a cache), whether or not all of their items ended well, sorted.
        facts: Short facts that its log noted: mode, bound, predicted percentile, …
    """

    order: Order
    status: str
    latency_s: float
    ran: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A stage in the graph, as its newest run showed it."""

    order: Order
    position: int
    document: Mapping[str, Any]


@dataclass(frozen=True)
class Ledger:
    """See the module. Only ``absorb`` makes one that isn't empty.

    Attributes:
        runs: Summaries by run id.
        places: Places by stage name.
        groups: What was measured, by code and setting.
        frame: The newest run's workflow document without its stages (constraints, capacity), and its order.
        row_budget: Rows that are kept at most, over all groups.
        retired: Digests of codes whose rows were dropped. When one comes back, only a rebuild restores its rows.
    """

    runs: Mapping[str, RunSummary] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    groups: Mapping[Code, Mapping[Setting, Measured]] = field(default_factory=dict)
    frame: tuple[Order, Mapping[str, Any]] | None = None
    row_budget: int = ROWS
    retired: frozenset[str] = frozenset()

    def absorb(self, records: Iterable[RunRecord]) -> Ledger:
        """The ledger with these records in it. Records must be new to it; the caller knows which are."""
        runs, places, groups, frame = dict(self.runs), dict(self.places), dict(self.groups), self.frame
        for record in records:
            order = _order(record)
            if record.own:
                runs[record.run_id] = _summary(record, order)
                if record.workflow is not None:
                    frame = _newer(frame, order, record.workflow)
                    _place(places, order, record.workflow)
            for stage in record.training:
                code = Code(stage.row.stage, *stage.key.code)
                measured = groups[code] = dict(groups.get(code, {}))
                kept = measured.get(setting := _setting(stage), Measured())
                measured[setting] = Measured(kept.moments.plus(stage), (*kept.rows, _rounded(stage)))
        return replace(self, runs=runs, places=places, groups=groups, frame=frame)._bounded()

    def lost(self, records: Iterable[RunRecord]) -> bool:
        """Whether some of these records are of code whose earlier rows have been dropped."""
        codes = {Code(s.row.stage, *s.key.code) for record in records for s in record.training}
        return any(digest(code)[:8] in self.retired for code in codes)

    def with_budget(self, rows: int) -> Ledger:
        """A copy that keeps at most so many rows; a budget never grows."""
        return replace(self, row_budget=min(rows, self.row_budget))._bounded()

    @property
    def rows(self) -> int:
        """Rows kept, over all groups."""
        return sum(len(measured.rows) for group in self.groups.values() for measured in group.values())

    def completed(self) -> tuple[RunSummary, ...]:
        """Completed runs among those kept, oldest first."""
        return tuple(run for run in self.counted() if run.status == "completed")

    def counted(self) -> tuple[RunSummary, ...]:
        """Runs that the bound is kept or missed by, oldest first: those that completed or timed out."""
        ended = (run for run in self.runs.values() if run.status in ("completed", "timed_out"))
        return tuple(sorted(ended, key=lambda run: run.order))

    def newest(self, code: Code) -> Order:
        """Order of the newest row of a code."""
        return max(row_order(row)[0] for measured in self.groups[code].values() for row in measured.rows)

    def _bounded(self) -> Ledger:
        newest_runs = sorted(self.runs.values(), key=lambda run: run.order)[-RUNS:]
        orders = {run.order for run in newest_runs}
        live = self._live()
        retired = self.retired | {digest(code)[:8] for code in self.groups if code not in live}
        quota = max(1, self.row_budget // max(1, len(live)))
        return replace(
            self,
            runs={run.order.run_id: run for run in newest_runs},
            places={name: place for name, place in self.places.items() if place.order in orders},
            groups={code: _filled(self.groups[code], quota) for code in live},
            retired=retired,
        )

    def _live(self) -> list[Code]:
        """Codes whose rows are kept: the newest versions of each stage, and of these the newest ``GROUPS``."""
        by_stage: dict[str, list[Code]] = {}
        for code in sorted(self.groups, key=lambda code: (self.newest(code), code), reverse=True):
            by_stage.setdefault(code.stage, []).append(code)
        versions = [code for codes in by_stage.values() for code in codes[:VERSIONS]]
        return sorted(sorted(versions, key=lambda code: (self.newest(code), code), reverse=True)[:GROUPS])


def row_order(stage: StageRecord) -> tuple[Order, float]:
    """Which of two rows is the newer."""
    started = stage.row.started_at
    return Order(0 if math.isnan(started) else int(started), stage.row.run_id), stage.row.wall_s


def _filled(group: Mapping[Setting, Measured], quota: int) -> dict[Setting, Measured]:
    """The group within its quota: the newest ``level`` rows of each setting, the level as high as the quota allows."""
    settings = sorted(group)
    if len(settings) > quota:  # more settings than rows to keep: a fixed choice that doesn't depend on order
        settings = sorted(sorted(settings, key=lambda setting: digest(setting))[:quota])
    level = _level([group[setting].moments.rows for setting in settings], quota)
    return {
        setting: replace(group[setting], rows=tuple(sorted(group[setting].rows, key=row_order)[-level:]))
        for setting in settings
    }


def _level(counts: Sequence[int], quota: int) -> int:
    """The largest k with Σ min(count, k) ≤ quota, at least 1."""
    level, left = 0, quota
    for i, count in enumerate(sorted(counts)):
        step = min(count - level, left // (len(counts) - i))
        level, left = level + step, left - step * (len(counts) - i)
        if level < count:
            break
    return max(1, level)


def _order(record: RunRecord) -> Order:
    return Order(0 if math.isnan(record.started_at) else int(record.started_at), record.run_id)


def _summary(record: RunRecord, order: Order) -> RunSummary:
    ran = {stage.row.stage for stage in record.stages if stage.status in ("completed", "cached", "failed")}
    short = {
        name: _significant(value)
        for name, value in record.facts.items()
        if isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= 40)
    }
    return RunSummary(order, record.status, _significant(record.latency_s), tuple(sorted(ran)), short)


def _newer(
    frame: tuple[Order, Mapping[str, Any]] | None, order: Order, workflow: Mapping[str, Any]
) -> tuple[Order, Mapping[str, Any]]:
    if frame is not None and frame[0] >= order:
        return frame
    return order, {name: workflow[name] for name in ("constraints", "capacity") if name in workflow}


def _place(places: dict[str, Place], order: Order, workflow: Mapping[str, Any]) -> None:
    for position, document in enumerate(workflow.get("stages", ())):
        known = places.get(document["name"])
        if known is None or known.order < order:
            places[document["name"]] = Place(order, position, document)


def _setting(stage: StageRecord) -> Setting:
    row = stage.row
    return Setting(
        int(row.workers), float(row.memory_mb), float(row.vcpus), row.hardware, int(row.batch), canonical(stage.knobs)
    )


FLOATS = (
    "wall_s", "overhead_s", "read_s", "compute_s", "write_s", "bytes_in", "bytes_out", "cost_usd", "peak_memory_mb",
    "queue_s", "requests", "billed_s", "storage_usd", "start_s",
)  # fmt: skip
"""Columns of a row that are stored to five significant digits, far below run-to-run noise (2 % and more)."""


def _rounded(stage: StageRecord) -> StageRecord:
    # whole bytes are counted as integers, and come back from a block as floats
    row = replace(stage.row, **{name: _significant(float(getattr(stage.row, name))) for name in FLOATS})
    started = row.started_at
    return replace(stage, row=replace(row, started_at=started if math.isnan(started) else float(int(started))))


def _significant(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def _log(seconds: float) -> int:
    return round(math.log(max(seconds, 1e-6)) * LOG_SCALE)

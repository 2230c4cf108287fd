"""What was measured: of one stage in one run (a stage run), and of one bundle on one worker (an invocation)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefect_slo import columns
from prefect_slo.errors import InvalidObservation
from prefect_slo.units import positive

REQUIRED = ("run_id", "stage", "workers", "wall_s")
"""Columns that a stage-run table must have, besides ``memory_mb`` or ``vcpus``."""


@dataclass(frozen=True)
class Invocation:
    """One bundle on one worker. Times are seconds; instants are on the recording machine's monotonic clock.

    Attributes:
        stage: Stage of its items.
        worker: Worker that ran it, unique within the run.
        attempt: 1 for the first try of its items.
        items: Items that ended in it.
        failed: Of these, how many raised.
        dispatched: When the runner handed it over.
        queue_s: Longest wait of its items from ready to dispatched.
        waited_s: From there until a service took it: throttled calls, the start of a job, a cluster's queue.
        init_s: Start of the worker, where this was its first bundle; else 0.
        read_s: Receiving and unpickling arguments, and fetching the function where it lies on storage.
        load_s: Unpickling the function, where the worker did not have it, and the arguments as a whole.
        compute_s: Inside the task function (and Prefect's engine at level ``full``).
        write_s: Pickling and sending results.
        dump_s: Of ``write_s``, pickling.
        cpu_s: CPU time of the worker process.
        peak_memory_mb: High-water mark of resident memory.
        bytes_in: Bytes of pickled arguments.
        bytes_out: Bytes of pickled results.
        cold: Whether it waited for a worker to start.
        billed_ms: Milliseconds that it is billed for, where a service bills each invocation or job.
        requests: How many of those there were: calls that keep Prefect's engine are one each.
    """

    stage: str
    worker: int
    items: int
    dispatched: float
    attempt: int = 1
    failed: int = 0
    queue_s: float = 0.0
    init_s: float = 0.0
    read_s: float = 0.0
    compute_s: float = 0.0
    write_s: float = 0.0
    cpu_s: float = 0.0
    peak_memory_mb: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    cold: bool = False
    waited_s: float = 0.0
    load_s: float = 0.0
    dump_s: float = 0.0
    billed_ms: int = 0
    requests: int = 0


@dataclass(frozen=True)
class StageRun:
    """One stage in one run: a row of the stage-run table.

    Attributes:
        run_id: Flow run, or any name of one run of the workflow.
        stage: Stage name.
        workers: Workers that ran it at once.
        memory_mb: Memory of each.
        vcpus: vCPUs of each.
        wall_s: From its first item ready to its last item done, less ``queue_s``.
        overhead_s: Wall time less the mean busy time of its workers: dispatch, start-up, waiting for the slowest.
        read_s: Mean over the workers of the time spent reading input.
        compute_s: Mean over the workers of the time spent computing.
        write_s: Mean over the workers of the time spent writing output.
        items: Calls made; 0 where the table doesn't say (divisible work).
        batch: Items in one call.
        bytes_in: Bytes read over all workers.
        bytes_out: Bytes written over all workers.
        cold: Whether it waited for any of its workers to start.
        cost_usd: Cost over all workers; ``nan`` where the table doesn't say.
        peak_memory_mb: Highest over its workers; ``nan`` where unknown.
        hardware: Kind of machine, an open name.
        started_at: Unix time of its first item, or ``nan``.
        queue_s: Mean over the workers of the time spent waiting for capacity that other runs held; no part of
            ``wall_s``. ``nan`` where unknown.
        requests: Invocations or jobs that were billed, where the stage ran on a service that bills each, or bundles
            that a cluster's scheduler gave room; else ``nan``.
        billed_s: Seconds that were billed over all of them, starts and rounding included, or for which bundles held
            their room; of workers that are leased elsewhere the seconds that they were held, with their start and what
            they idled before. Else ``nan``.
        storage_usd: Of ``cost_usd``, what reading and writing objects cost; else ``nan``.
        start_s: Mean over the workers of the time that it waited for them to start, 0 for those that were up; part of
            ``wall_s``. ``nan`` where unknown.
    """

    run_id: str
    stage: str
    workers: int
    memory_mb: float
    vcpus: float
    wall_s: float
    overhead_s: float = float("nan")
    read_s: float = float("nan")
    compute_s: float = float("nan")
    write_s: float = float("nan")
    items: int = 0
    batch: int = 1
    bytes_in: float = float("nan")
    bytes_out: float = float("nan")
    cold: bool = False
    cost_usd: float = float("nan")
    peak_memory_mb: float = float("nan")
    hardware: str = "cpu"
    started_at: float = float("nan")
    queue_s: float = float("nan")
    requests: float = float("nan")
    billed_s: float = float("nan")
    storage_usd: float = float("nan")
    start_s: float = float("nan")


@dataclass(frozen=True, eq=False)
class StageRuns:
    """A stage-run table as typed columns, each of shape ``(n_rows,)``: what models are fitted to.

    Attributes:
        columns: One array per field of ``StageRun``.
        extra: Unknown columns, kept as they came (knobs, features of the input).
    """

    columns: Mapping[str, NDArray[Any]]
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns["stage"])

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    @classmethod
    def of(cls, rows: Iterable[StageRun]) -> StageRuns:
        """Columns from rows.

        Raises:
            InvalidObservation: A row that can't be a measurement.
        """
        rows = list(rows)
        for row in rows:
            if not isinstance(row, StageRun):
                raise InvalidObservation("stage run", row, "StageRun(...)")
        return cls.from_table({f.name: [getattr(row, f.name) for row in rows] for f in fields(StageRun)})

    @classmethod
    def from_table(cls, table: Any, *, mb_per_vcpu: float = 1769.0) -> StageRuns:
        """Columns from a pandas table, or any mapping of column names to sequences.

        Args:
            table: Has the columns ``REQUIRED`` and ``memory_mb`` or ``vcpus``; optional ones as in ``StageRun``.
            mb_per_vcpu: Ties memory and vCPU where only one of them is given.

        Raises:
            InvalidObservation: A missing column, or a value that can't be a measurement, with its row.
        """
        names = _column_names(table)
        positive(mb_per_vcpu, "mb_per_vcpu")
        n = len(columns.names("stage", table["stage"], None))
        read = {f.name: _column(f, table[f.name] if f.name in names else None, n) for f in fields(StageRun)}
        _tie(read, mb_per_vcpu)
        known = {f.name for f in fields(StageRun)}
        extra = {str(name): _untyped(str(name), table[name]) for name in names if name not in known}
        for name, column in (*read.items(), *extra.items()):
            if len(column) != n:
                raise InvalidObservation(name, f"{len(column)} rows", f"{n} rows, as many as the column 'stage' has")
        runs = cls(read, extra)
        runs._validate()
        return runs

    def select(self, mask: NDArray[np.bool_]) -> StageRuns:
        """The rows where ``mask`` (shape ``(n_rows,)``) holds."""
        return StageRuns(
            {name: column[mask] for name, column in self.columns.items()},
            {name: column[mask] for name, column in self.extra.items()},
        )

    def of_stage(self, stage: str) -> StageRuns:
        """The rows of one stage."""
        return self.select(self["stage"] == stage)

    def concat(self, other: StageRuns) -> StageRuns:
        """Both tables, one after the other; unknown columns that only one of them has are dropped."""
        both = [name for name in self.extra if name in other.extra]
        return StageRuns(
            {name: np.concatenate([self[name], other[name]]) for name in self.columns},
            {name: np.concatenate([self.extra[name], other.extra[name]]) for name in both},
        )

    def rows(self) -> tuple[StageRun, ...]:
        """The rows as values."""
        names = [f.name for f in fields(StageRun)]
        values = zip(*(self[name].tolist() for name in names), strict=True)
        return tuple(StageRun(**dict(zip(names, row, strict=True))) for row in values)

    def _validate(self) -> None:
        for f in fields(StageRun):
            column = self[f.name]
            if f.name in ("wall_s", "memory_mb", "vcpus", "workers", "batch"):
                columns.refuse(f.name, ~(np.isfinite(column) & (column > 0)), column, "a finite number above 0")
            elif f.name == "started_at":
                columns.refuse(f.name, np.isinf(column), column, "a Unix time, or empty")
            elif column.dtype.kind in "if":
                columns.refuse(f.name, np.isinf(column) | (column < 0), column, "0 or more, or empty")


def _column_names(table: Any) -> list[Any]:
    try:
        names = list(table.keys())
    except (AttributeError, TypeError):
        raise InvalidObservation("table", table, "a pandas table, or a mapping of column names to lists") from None
    for name in REQUIRED:
        if name not in names:
            raise InvalidObservation("column", name, f"to be in the table; it has {', '.join(map(str, names))}")
    if "memory_mb" not in names and "vcpus" not in names:
        raise InvalidObservation("column", "memory_mb", "memory_mb or vcpus in the table")
    return names


def _column(of: Field[Any], values: Any, n: int) -> NDArray[Any]:
    """One typed column; a column that the table doesn't have holds the default of its field."""
    default = None if of.default is MISSING else of.default
    if values is None:
        missing: Any = np.nan if default is None else default
        return np.full(n, missing, dtype=object if isinstance(missing, str) else np.asarray(missing).dtype)
    if of.name in ("run_id", "stage", "hardware"):
        return columns.names(of.name, values, default)
    if of.name in ("workers", "items", "batch"):
        return columns.wholes(of.name, values, default)
    if of.name == "cold":
        return columns.flags(of.name, values)
    return columns.floats(of.name, values, instants=of.name == "started_at")


def _tie(read: dict[str, NDArray[Any]], mb_per_vcpu: float) -> None:
    """Fill in what is empty of memory and vCPU from the other one."""
    memory_mb, vcpus = read["memory_mb"], read["vcpus"]
    if len(memory_mb) == len(vcpus):
        read["vcpus"] = np.where(np.isnan(vcpus), memory_mb / mb_per_vcpu, vcpus)
        read["memory_mb"] = np.where(np.isnan(memory_mb), vcpus * mb_per_vcpu, memory_mb)


def _untyped(name: str, values: Any) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError:
        raise InvalidObservation(name, values, "a column of single values") from None

"""The rows that a model keeps: what it is fitted to, updated with, and stored as.

A fit is a function of these rows alone, so that a stored model predicts exactly what the live one did, and an update
equals a re-fit on all rows. What is kept depends only on rows that came later, never on when they were handed over:

* times are rounded to six digits, below any clock's jitter;
* rows that agree in every measured value are clones and count once, so that copies add no certainty;
* of each setting the latest rows are kept, settings taking turns, up to ``limit`` rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from prefect_slo.errors import UnknownStage
from prefect_slo.models.design import STEPS, Floats
from prefect_slo.observation import StageRuns
from prefect_slo.workflow import Workflow

NUMBERS = (
    "workers", "vcpus", "memory_mb", "upstream", "items", "batch", "wall_s", "busy_s", *STEPS, "peak_memory_mb", "cold",
    "requests", "billed_s", "storage_usd", "start_s",
)  # fmt: skip
_SETTING = ("workers", "vcpus", "memory_mb", "upstream", "batch")
_DIGITS = 6


@dataclass(frozen=True)
class History:
    """Rows of one stage, oldest first.

    Attributes:
        run: Number of the run of each row, shape ``(n_rows,)``; later runs have higher numbers.
        numbers: Columns ``NUMBERS`` and one per input feature; ``nan`` where unknown.
        hardware: Kind of machine.
        knobs: Knobs and their values in one name, ``""`` without.
    """

    run: NDArray[np.int64]
    numbers: Mapping[str, Floats]
    hardware: NDArray[np.str_]
    knobs: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.run)

    def __getitem__(self, column: str) -> Floats:
        return self.numbers[column]

    def take(self, index: NDArray[Any]) -> History:
        """The rows at ``index`` (positions or a mask)."""
        return History(
            self.run[index], {name: column[index] for name, column in self.numbers.items()}, self.hardware[index],
            self.knobs[index],
        )  # fmt: skip

    def followed_by(self, later: History, limit: int) -> History:
        """Both, clones and surplus rows dropped."""
        names = list(dict.fromkeys([*self.numbers, *later.numbers]))
        both = History(
            np.concatenate([self.run, later.run]),
            {name: np.concatenate([_column(self, name), _column(later, name)]) for name in names},
            np.concatenate([self.hardware, later.hardware]),
            np.concatenate([self.knobs, later.knobs]),
        )
        return both._distinct()._latest(limit)

    def to_document(self) -> dict[str, Any]:
        """Columns as lists; a column of one value as that value, an unknown one not at all."""
        columns: dict[str, Any] = {"run": self.run.tolist()}
        for name, column in {**self.numbers, "hardware": self.hardware, "knobs": self.knobs}.items():
            values = [_plain(value) for value in column.tolist()]
            if len(set(values)) > 1:
                columns[name] = values
            elif values and values[0] is not None:
                columns[name] = values[0]
        return columns

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read what ``to_document`` wrote."""
        run = np.asarray(document["run"], dtype=np.int64)

        def column(name: str) -> list[Any]:
            values = document.get(name)
            return values if isinstance(values, list) else [values] * len(run)

        names = [*NUMBERS, *(name for name in document if name not in (*NUMBERS, "run", "hardware", "knobs"))]
        numbers = {name: np.asarray([np.nan if v is None else v for v in column(name)], dtype=float) for name in names}
        return cls(
            run, numbers, np.asarray(column("hardware"), dtype=str),
            np.asarray([knob or "" for knob in column("knobs")], dtype=str),
        )  # fmt: skip

    def _distinct(self) -> History:
        names = [np.unique(column, return_inverse=True)[1] for column in (self.hardware, self.knobs)]
        last = np.unique(_hashes([*self.numbers.values(), *names])[::-1], return_index=True)[1]
        return self.take(np.sort(len(self) - 1 - last))

    def _latest(self, limit: int) -> History:
        if len(self) <= limit:
            return self
        codes = np.unique(_hashes([*(self[name] for name in _SETTING), self["cold"]]), return_inverse=True)[1]
        from_end = np.empty(len(self), dtype=np.int64)
        order = np.lexsort((-np.arange(len(self)), codes))
        starts = np.concatenate([[True], np.diff(codes[order]) > 0])
        position = np.arange(len(self))
        from_end[order] = position - np.maximum.accumulate(np.where(starts, position, 0))
        kept = np.lexsort((-np.arange(len(self)), from_end))[:limit]
        return self.take(np.sort(kept))


def read(
    workflow: Workflow, runs: StageRuns, features: Sequence[str], *, first_run: int = 0
) -> tuple[dict[str, History], dict[str, int]]:
    """Rows by stage, and the number given to each run.

    Upstream workers are summed over the parents' rows of the same run; knobs are the menu's, read from columns of
    their names.

    Args:
        workflow: Its stages are the ones the table may name.
        runs: The table.
        features: Columns that hold input features.
        first_run: Number of the first run.

    Raises:
        UnknownStage: A row of a stage that the workflow doesn't have.
    """
    stages = runs["stage"]
    names, which = np.unique(stages.astype(str), return_inverse=True)
    for name in names.tolist():
        if name not in workflow:
            raise UnknownStage(name, tuple(stage.name for stage in workflow.stages))
    run_ids, run = _numbered(runs)
    workers_in_run = {}
    for code, name in enumerate(names.tolist()):
        counts = np.zeros(len(run_ids))
        mine = which == code
        counts[run[mine]] = runs["workers"][mine]
        workers_in_run[name] = counts
    order = np.argsort(run, kind="stable")
    histories = {}
    for code, name in enumerate(names.tolist()):
        rows = order[which[order] == code]
        absent = np.zeros(len(run_ids))
        upstream = sum((workers_in_run.get(parent, absent) for parent in workflow[name].parents), absent)
        histories[name] = _history(workflow, name, runs, rows, run[rows], upstream[run[rows]], features, first_run)
    return histories, {run_id: first_run + k for k, run_id in enumerate(run_ids)}


def _history(
    workflow: Workflow, name: str, runs: StageRuns, rows: NDArray[np.int64], run: NDArray[np.int64], upstream: Floats,
    features: Sequence[str], first_run: int,
) -> History:  # fmt: skip
    numbers = {column: runs[column][rows].astype(float) for column in NUMBERS if column not in ("upstream", "busy_s")}
    numbers["upstream"] = upstream
    idle = np.nan_to_num(runs["overhead_s"][rows], nan=0.0)
    numbers["busy_s"] = np.clip(numbers["wall_s"] - idle, 1e-3 * numbers["wall_s"], None)
    for feature in features:
        if feature in runs.extra:
            numbers[feature] = runs.extra[feature][rows].astype(float)
        elif feature in runs.columns:
            numbers[feature] = runs[feature][rows].astype(float)
    knobs = sorted(knob for knob in workflow[name].menu.knobs if knob in runs.extra)
    labels = [
        knob_label(zip(knobs, values, strict=True))
        for values in zip(*(runs.extra[k][rows].tolist() for k in knobs), strict=True)
    ]
    rounded = {column: _rounded(values) for column, values in numbers.items()}
    return History(
        run + first_run, rounded, runs["hardware"][rows].astype(str), np.asarray(labels or [""] * len(rows), dtype=str)
    )


def knob_label(knobs: Any) -> str:
    """One name for knobs and their values: ``"model=large,resolution=720"``; numbers without a trailing ``.0``."""
    return ",".join(
        f"{name}={value:g}" if isinstance(value, (int, float)) else f"{name}={value}" for name, value in knobs
    )


def _numbered(runs: StageRuns) -> tuple[list[str], NDArray[np.int64]]:
    """Run ids, oldest first, and the position of each row's run among them."""
    ids, first, inverse = np.unique(runs["run_id"].astype(str), return_index=True, return_inverse=True)
    started = runs["started_at"]
    if np.isfinite(started).all():
        age = np.full(len(ids), np.inf)
        np.minimum.at(age, inverse, started)
        order = np.lexsort((first, age))
    else:
        order = np.argsort(first)
    position = np.empty(len(ids), dtype=np.int64)
    position[order] = np.arange(len(ids))
    return ids[order].tolist(), position[inverse]


def _rounded(values: Floats) -> Floats:
    """Six significant digits, as the very doubles that reading them back from JSON gives."""
    with np.errstate(divide="ignore", invalid="ignore"):
        magnitude = np.floor(np.log10(np.abs(values)))
    digits = _DIGITS - 1 - np.where(np.isfinite(magnitude), magnitude, 0.0)
    up, down = 10.0 ** np.maximum(digits, 0.0), 10.0 ** np.maximum(-digits, 0.0)
    rounded: Floats = np.round(values * up / down) / up * down
    return rounded


def _hashes(columns: Sequence[NDArray[Any]]) -> NDArray[np.uint64]:
    """One 64-bit number per row, equal for equal rows: sorting these is 20 times faster than sorting rows."""
    hashes = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        bits = (np.nan_to_num(column.astype(float), nan=-1.0) + 0.0).view(np.uint64)
        hashes = (hashes ^ bits) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _column(history: History, name: str) -> Floats:
    return history.numbers.get(name, np.full(len(history), np.nan))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if not np.isfinite(value):
            return None
        return int(value) if value == int(value) else value
    return value

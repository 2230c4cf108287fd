"""What a stage would take where it was not measured: on threads, or on another share of a GPU.

On threads: without what moving arguments and results between processes takes.

A worker process gets its arguments pickled and sends its results back so; a thread of the flow's own process gets them
as they are. Where arguments are big that is most of a stage's time, and threads are the better choice although they
share one interpreter. Rows that were measured on processes tell both parts: reading and writing are the transfer, and
grow with the bytes moved; computing is what stays.

Until a stage was measured on threads it is taken to compute one item at a time, on one core, as pure Python does that
never gives up the interpreter's lock:

    wall on threads = Σ over workers of compute · v

an upper bound for code that uses its cores well. Native code is faster than that: the first runs on threads show it.

On a share *g* of a GPU whose device is full of shares like it: the time on another share *h* (1 is the whole device),
times slowdown(g) / slowdown(h), as measured (``Interference``); the same time where nothing was.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prefect_slo.models.design import Floats
from prefect_slo.models.history import History
from prefect_slo.placement import Interference

THREAD = "thread"
"""Hardware of options that run on threads of the flow's process."""

_HANDOVER_S = 1e-4
"""Least time of a call on a thread."""


def transfer_share(rows: History) -> float:
    """Median share of busy time that goes into moving bytes; ``nan`` where the rows don't tell steps."""
    moved, computed = rows["read_s"] + rows["write_s"], rows["compute_s"]
    known = np.isfinite(moved) & np.isfinite(computed) & (moved + computed > 0)
    return float(np.median(moved[known] / (moved + computed)[known])) if known.any() else float("nan")


def on_threads(rows: History) -> History | None:
    """Rows as they would have been on threads; ``None`` where those of processes don't tell steps.

    Args:
        rows: Of one stage, measured on worker processes.
    """
    known = np.isfinite(rows["compute_s"]) & (rows["compute_s"] > 0) & (rows.hardware != THREAD)
    if not known.any():
        return None
    rows = rows.take(known)
    serial: Floats = np.maximum(rows["compute_s"] * rows["workers"] * np.maximum(rows["vcpus"], 1.0), _HANDOVER_S)
    nothing = np.zeros(len(rows))
    changed = {"wall_s": serial, "busy_s": serial, "read_s": nothing, "compute_s": serial, "write_s": nothing}
    numbers = {**rows.numbers, **changed, "vcpus": np.ones(len(rows))}
    return History(rows.run, numbers, np.full(len(rows), THREAD), rows.knobs)


def share_of(kind: str) -> tuple[str, float]:
    """The hardware of a kind, and which part of a GPU (``gpu:0.25``); 1 for a whole one or none."""
    hardware, _, part = kind.rpartition(":")
    try:
        gpu = float(part)
    except ValueError:
        return kind, 1.0
    return (hardware, gpu) if hardware and 0 < gpu < 1 else (kind, 1.0)


def nearest_share(kind: str, known: Iterable[str]) -> str | None:
    """The kind to take rows from for a share that was not measured: the same hardware's, the nearest share of it."""
    hardware, gpu = share_of(kind)
    same = [other for other in known if share_of(other)[0] == hardware]
    return min(same, key=lambda other: (abs(share_of(other)[1] - gpu), other), default=None)


def on_share(rows: History, kind: str, slowdown: Interference) -> History:
    """Rows of one share of a GPU as they would have been on another.

    Args:
        rows: Of one stage, measured on one kind.
        kind: The other kind.
        slowdown: Of sharers.
    """
    measured_on = share_of(str(rows.hardware[0]))[1]
    factor = slowdown.at(share_of(kind)[1]) / slowdown.at(measured_on)
    scaled = {name: rows[name] * factor for name in ("wall_s", "busy_s", "compute_s")}
    return History(rows.run, {**rows.numbers, **scaled}, np.full(len(rows), kind), rows.knobs)

"""The log of one run while it goes on: one JSON line a record, readable whatever happens to the process.

Every record is handed to the operating system before the call returns, so that a killed process loses nothing; a
thread of the log's own syncs the file to disk, at most once a second and at the end of a stage, so that a machine that
stops loses about a second. The file is locked as long as its writer lives.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect_slo.errors import InvalidObservation
from prefect_slo.observation import Invocation, StageRun
from prefect_slo.telemetry import locks
from prefect_slo.telemetry.machine import machine_facts
from prefect_slo.telemetry.packing import plain
from prefect_slo.telemetry.records import (
    RunRecord,
    StageKey,
    StageRecord,
    Status,
    check_status,
    compact,
    expand,
    read_stage,
    stage_document,
)

SUFFIX = ".slolog"
SYNC_INTERVAL_S = 1.0
_logger = logging.getLogger("prefect.slo")
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


class RunLog:
    """Append-only log of one run. Any thread may write; nothing here raises for a full or missing disk.

    Where the file can't be written the records stay in memory, one warning says so, and the run's telemetry is
    published at its end all the same.

    Args:
        flow_name: Name of the flow.
        flow_run_id: Flow-run id, or any name of one run.
        directory: Where logs of runs under way lie; created when missing.
        attempt: Which attempt of the flow run this is.
        facts: What is known at the start: objective, plan, prediction, mode. See ``note``.
    """

    def __init__(
        self,
        flow_name: str,
        flow_run_id: object,
        directory: str | Path,
        *,
        attempt: int = 1,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.flow_name = flow_name
        self.run_id = str(flow_run_id) if attempt == 1 else f"{flow_run_id}#{attempt}"
        self.path: Path | None = None
        self._descriptor = -1
        self._kept: list[str] = []
        self._lock = threading.Lock()
        self._dirty, self._closing = threading.Event(), threading.Event()
        self._urgent = threading.Event()
        self._syncer: threading.Thread | None = None
        opening = {"t": "run", "flow": flow_name, "run_id": self.run_id, "at": time.time(), "pid": os.getpid()}
        self._open(Path(directory), opening)
        self.note(machine=machine_facts(), **(facts or {}))

    def note(self, **facts: Any) -> None:
        """Add facts about the run (objective, plan, predicted, mode, …); a later fact of the same name wins."""
        self._write({"t": "facts", "facts": plain(facts)})

    def workflow(self, document: Mapping[str, Any]) -> None:
        """Note the stage graph as far as the run has shown it; the last one counts."""
        self._write({"t": "workflow", "workflow": plain(document)})

    def invocation(self, invocation: Invocation) -> None:
        """Add what one bundle took on its worker."""
        self._write({"t": "i", **compact(invocation)})

    def stage_run(
        self,
        row: StageRun,
        key: StageKey,
        *,
        status: Status = "completed",
        knobs: Mapping[str, Any] | None = None,
        features: Mapping[str, Any] | None = None,
    ) -> None:
        """Add what one stage took, and sync soon.

        Args:
            row: What was measured.
            key: What its model is kept under.
            status: Anything but ``completed`` is kept and never trains.
            knobs: Values of the task's knobs, JSON scalars by name.
            features: What is known of the input (its size, …), JSON scalars by name.
        """
        record = StageRecord(row, key, status, plain(knobs or {}), plain(features or {}))
        self._write({"t": "stage", **stage_document(record)})
        self._urgent.set()
        self._dirty.set()

    def end(self, status: Status, *, latency_s: float = math.nan, **facts: Any) -> None:
        """Add how the run ended, and sync now."""
        check_status(status)
        self._write({"t": "end", "status": status, "latency_s": plain(float(latency_s)), "facts": plain(facts)})
        self._stop_syncing()
        self._sync()

    def record(self) -> RunRecord:
        """What the log holds so far."""
        lines = self._kept if self.path is None else [*_lines(self.path.read_bytes()), *self._kept]
        record = _assemble(lines)
        if record is None:
            raise InvalidObservation("log", str(self.path), "a log that this process has opened")
        return record

    def discard(self) -> None:
        """Remove the file; its content lies elsewhere now."""
        with self._lock:
            if self.path is not None:
                self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Stop writing and release the file. Idempotent; without ``end`` the run counts as crashed."""
        self._stop_syncing()
        self._sync()
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _open(self, directory: Path, opening: Mapping[str, Any]) -> None:
        name = f"{_safe(self.flow_name)}.{_safe(self.run_id)}.{os.getpid()}-{time.monotonic_ns()}"
        hidden, path = directory / f".{name}", directory / f"{name}{SUFFIX}"
        line = _encode(opening)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            locks.hold(self._descriptor)
            os.write(self._descriptor, f"{line}\n".encode())
            hidden.rename(path)  # whoever sees the final name sees a locked file with a first line
            self.path = path
        except OSError as error:
            self._fall_back(line, error)
            return
        self._syncer = threading.Thread(target=self._keep_synced, name="slo-telemetry-sync", daemon=True)
        self._syncer.start()

    def _write(self, record: Mapping[str, Any]) -> None:
        line = _encode(record)
        data = f"{line}\n".encode()
        with self._lock:
            if self._descriptor < 0:
                self._kept.append(line)
                return
            try:
                written = os.write(self._descriptor, data)
                if written < len(data):
                    raise OSError(f"{written} of {len(data)} bytes written")
            except OSError as error:
                self._fall_back(line, error)
                return
        self._dirty.set()

    def _fall_back(self, line: str, error: OSError) -> None:
        self._kept.append(line)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        _logger.warning(
            "Telemetry of run %s stays in memory until its end: its log cannot be written (%s).", self.run_id, error
        )

    def _keep_synced(self) -> None:
        while True:
            self._dirty.wait()
            self._dirty.clear()
            self._urgent.clear()
            if self._closing.is_set():  # set before the other two, so that none of them can be missed
                return
            self._sync()
            self._urgent.wait(SYNC_INTERVAL_S)

    def _stop_syncing(self) -> None:
        self._closing.set()
        self._urgent.set()
        self._dirty.set()
        if self._syncer is not None and self._syncer is not threading.current_thread():
            self._syncer.join(timeout=5.0)

    def _sync(self) -> None:
        with self._lock:
            descriptor = os.dup(self._descriptor) if self._descriptor >= 0 else -1
        if descriptor < 0:
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            _logger.warning("The log of run %s could not be synced (%s).", self.run_id, error)
        finally:
            os.close(descriptor)


def read_log(path: str | Path) -> RunRecord | None:
    """The run that a log tells of, ``None`` when not even its first line is whole.

    A last line without its end and lines that are damaged are left out; a log without an end is of a crashed run.

    Raises:
        OSError: The file cannot be read.
    """
    return _assemble(_lines(Path(path).read_bytes()))


def _lines(data: bytes) -> list[str]:
    """The whole lines: what follows the last line feed was being written when the process died."""
    return data.decode("utf-8", errors="replace").split("\n")[:-1]


def _assemble(lines: list[str]) -> RunRecord | None:
    opening: Mapping[str, Any] | None = None
    end: Mapping[str, Any] = {"status": "crashed"}
    facts: dict[str, Any] = {}
    workflow: Mapping[str, Any] | None = None
    invocations: list[Invocation] = []
    stages: list[StageRecord] = []
    damaged = 0
    for line in lines:
        try:
            entry = json.loads(line)
            kind = entry["t"]
            if kind == "i":
                invocations.append(expand(Invocation, entry))
            elif kind == "stage":
                stages.append(read_stage(entry))
            elif kind == "run":
                opening = {"flow": entry["flow"], "run_id": entry["run_id"], "started_at": entry["at"]}
            elif kind == "workflow":
                workflow = entry["workflow"]
            elif kind == "facts":
                facts.update(entry["facts"])
            elif kind == "end":
                check_status(entry["status"])
                facts.update(entry["facts"])
                end = {"status": entry["status"], "latency_s": _number(entry["latency_s"])}
        except (ValueError, KeyError, TypeError, AttributeError):  # InvalidObservation is a ValueError
            damaged += 1
    if opening is None:
        return None
    if damaged:
        facts["damaged_lines"] = damaged
    return RunRecord(
        **opening, **end, stages=tuple(stages), invocations=tuple(invocations), workflow=workflow, facts=facts
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _safe(text: str) -> str:
    """A piece of a file name: short, and of letters, digits and dashes."""
    return re.sub(r"[^0-9A-Za-z-]+", "-", text)[:60]

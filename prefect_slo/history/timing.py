"""When one task run was submitted, and when each of its attempts ran, by Prefect's records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from uuid import UUID

from prefect.client.schemas.objects import StateType, TaskRun

from prefect_slo.telemetry.records import Status

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

_STATUS: Mapping[StateType, Status] = {
    StateType.COMPLETED: "completed",
    StateType.FAILED: "failed",
    StateType.CANCELLED: "cancelled",
    StateType.CANCELLING: "cancelled",
}


@dataclass(frozen=True)
class Call:
    """One task run that became ready to run; instants are Unix times.

    Attributes:
        status: How it ended.
        submitted: When it was submitted.
        spans: Start and end of each of its attempts; none where its result came from a cache.
    """

    status: Status
    submitted: float
    spans: tuple[tuple[float, float], ...]

    @property
    def ended(self) -> float:
        """When its last attempt ended."""
        return max((end for _, end in self.spans), default=self.submitted)


def submitted_at(task_run_id: UUID) -> float | None:
    """Unix time at which a task run was submitted, from its id; ``None`` unless that is a version 7 UUID."""
    return (task_run_id.int >> 80) / 1000 if task_run_id.version == 7 else None


def submission(run: TaskRun) -> float:
    """Unix time of its submission; where its id doesn't tell, when a worker picked it up; infinity for neither."""
    at = submitted_at(run.id)
    if at is not None:
        return at
    picked_up = run.expected_start_time or run.start_time
    return picked_up.timestamp() if picked_up else math.inf


def call_of(api: SyncPrefectClient, run: TaskRun) -> Call | None:
    """The work of a task run, ``None`` when it never became ready to run.

    A completed one whose start or end was never recorded (the server drops events when it can't keep up) counts as
    crashed, so that its stage doesn't train.
    """
    if run.state_name == "NotReady" or run.state_type in (StateType.PENDING, StateType.SCHEDULED, None):
        return None
    spans = _spans(api, run)
    submitted = min([submission(run), *(start for start, _ in spans)])
    if math.isinf(submitted):
        return None
    status = _status(run)
    return Call("crashed" if status == "completed" and not spans else status, submitted, spans)


def _spans(api: SyncPrefectClient, run: TaskRun) -> tuple[tuple[float, float], ...]:
    """When its attempts ran."""
    if run.state_name == "Cached":
        return ()
    if run.run_count <= 1:
        if run.start_time is None or run.end_time is None:
            return ()
        return ((run.start_time.timestamp(), run.end_time.timestamp()),)
    states = sorted(api.read_task_run_states(run.id), key=lambda state: state.timestamp)
    following = [*states[1:], None]
    return tuple(
        (state.timestamp.timestamp(), after.timestamp.timestamp())
        for state, after in zip(states, following, strict=True)
        if state.type == StateType.RUNNING and after is not None
    )


def _status(run: TaskRun) -> Status:
    if run.state_name == "Cached":
        return "cached"
    if run.state_name == "TimedOut":
        return "timed_out"
    return _STATUS.get(cast(StateType, run.state_type), "crashed")


def most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """The most spans that overlap, at least 1; one that starts when another ends does not overlap it."""
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    most = running = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return max(1, most)

"""How a flow run has ended, by the state that Prefect's engine has given it by the time that its task runner ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prefect.client.schemas.objects import FlowRun, StateType

from prefect_slo.runner.exceptions import raised_in

if TYPE_CHECKING:
    from prefect_slo.telemetry.records import Status


def status(flow_run: FlowRun | None, *, failed: bool, cut_short: bool) -> Status:
    """How the flow ended: by the state that Prefect's engine has given it by the time that the runner ends.

    An attempt that will be retried has no final state; it has failed. A flow whose tasks were cut short has crashed,
    even where its function had returned before.
    """
    if cut_short:
        return "crashed"
    state = flow_run.state if flow_run is not None else None
    if state is None or not state.is_final():
        return "failed" if failed else "completed"
    if state.name == "TimedOut":
        return "timed_out"
    return _ENDINGS[state.type]


def raised(flow_run: FlowRun) -> bool:
    """Whether a flow function that has ended did so by raising, by the state that Prefect's engine made of that.

    What it has returned may be failed states, and then holds no exception. After an attempt that is followed by another
    the run is running again. Such a one may have returned, too: a failed state. Nobody reads that, as if it had raised.
    """
    state = flow_run.state
    if state is None or state.is_running():
        return state is not None
    return not state.is_completed() and raised_in(state) is not None


_ENDINGS: Mapping[StateType, Status] = {
    StateType.COMPLETED: "completed",
    StateType.FAILED: "failed",
    StateType.CRASHED: "crashed",
    StateType.CANCELLED: "cancelled",
}

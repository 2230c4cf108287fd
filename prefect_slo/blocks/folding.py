"""Learning: runs that the API holds are folded into the flow's profile, and the model is fitted again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from prefect.exceptions import ObjectAlreadyExists

from prefect_slo.blocks.elsewhere import known_elsewhere
from prefect_slo.blocks.lease import profile_lease
from prefect_slo.blocks.profile import MAX_BYTES, SLOProfile
from prefect_slo.errors import SloError
from prefect_slo.observation import StageRuns
from prefect_slo.telemetry.api import api_client
from prefect_slo.telemetry.ledger import Ledger
from prefect_slo.telemetry.store import Stored, publish, read_runs
from prefect_slo.workflow import Workflow

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

Fit = Callable[[Workflow, StageRuns, Mapping[str, float]], Mapping[str, Any]]
"""Fits a workflow model: ``(workflow, stage runs, run latency by run id) -> its document``."""

IDENTIFIED = "identified"
"""Field of a model's document, beside its own: whether each stage can be planned, and why, or why not."""

OUTGROWN = "too large to store: it is fitted to the rows where it is needed"

LEAST_ROWS = 100
"""Rows of a profile that outgrows a block, which its model is fitted to again, before the model itself is left out."""

_logger = logging.getLogger("prefect.slo")


def fit_model(workflow: Workflow, stage_runs: StageRuns, run_latency_s: Mapping[str, float]) -> Mapping[str, Any]:
    """The document of the package's own workflow model, fitted to these rows.

    Columns that are no knobs are features of the input, as ``@slo(features=...)`` names them; without any, bytes read
    stand for the size of the input.
    """
    from prefect_slo.models.workflow_model import WorkflowModel

    knobs = {knob for stage in workflow.stages for knob in stage.menu.knobs}
    features = tuple(name for name in stage_runs.extra if name not in knobs) or ("bytes_in",)
    model = WorkflowModel(workflow, features=features, measured_items=True).fit(stage_runs, run_latency_s=run_latency_s)
    verdicts = {stage.name: model.identified(stage.name) for stage in workflow.stages}
    told = {name: [bool(verdict), verdict.reason] for name, verdict in verdicts.items()}
    return {**model.to_document(), IDENTIFIED: told}


def fold_in(
    flow_name: str,
    *,
    fit: Fit = fit_model,
    objective: Mapping[str, Any] | None = None,
    refit: bool = False,
    timeout_s: float = 120.0,
    client: SyncPrefectClient | None = None,
) -> SLOProfile:
    """Bring the flow's profile up to date with the runs that the API holds, and return it.

    Under the lease: load the newest profile, absorb what it doesn't cover, take over rows of tasks that other flows
    have profiled, fit, save. Any number of processes may call it at once; each run counts once.

    Args:
        flow_name: Name of the flow.
        fit: Fits the workflow model.
        objective: Replaces the stored objective.
        refit: Fit and save even when no run is new.
        timeout_s: How long to wait for another writer.
        client: Client for reading; one is made when missing.

    Raises:
        TimeoutError: Another writer took too long.
        httpx.HTTPError: The API cannot be reached, or refuses.
    """
    with ExitStack() as stack:
        api = client or stack.enter_context(api_client())
        stack.enter_context(profile_lease(flow_name, timeout_s=timeout_s, client=api))
        known = SLOProfile.of_flow(flow_name, api)
        profile = known or SLOProfile(flow_name=flow_name)
        if objective is not None:
            profile = profile.model_copy(update={"objective": dict(objective)})
        stored = tuple(read_runs(flow_name, since=profile.since, client=api))
        fresh = profile.new_among(stored)
        if not fresh and not refit and known is not None and profile == known:
            return known
        if profile.ledger().lost(fresh):  # code that was in force earlier is back: its rows are still in the API
            stored = tuple(read_runs(flow_name, client=api))
            profile = _emptied(profile)
        profile = _with_rows_from_elsewhere(profile, stored, api)
        return _written(_fitted(profile, fit), fit)


def rebuild_profile(
    flow_name: str, client: SyncPrefectClient | None = None, *, fit: Fit = fit_model, timeout_s: float = 120.0
) -> SLOProfile:
    """Learn everything anew from the API alone; the same runs give the same observations and the same model.

    Objective and plan are kept where a profile is stored.

    Raises:
        TimeoutError: Another writer took too long.
        httpx.HTTPError: The API cannot be reached, or refuses.
    """
    with profile_lease(flow_name, timeout_s=timeout_s):
        profile = _emptied(SLOProfile.of_flow(flow_name) or SLOProfile(flow_name=flow_name))
        return _written(_fitted(profile.absorbed(read_runs(flow_name, client=client)), fit), fit)


def update_profile(
    flow_name: str, change: Callable[[SLOProfile], SLOProfile], *, timeout_s: float = 120.0
) -> SLOProfile:
    """Change the newest profile under the lease, and save it; a new one is made where there is none.

    Nothing is written where ``change`` returns the very profile that it was given.

    Raises:
        TimeoutError: Another writer took too long.
        httpx.HTTPError: The API cannot be reached, or refuses.
    """
    with profile_lease(flow_name, timeout_s=timeout_s):
        profile = SLOProfile.of_flow(flow_name) or SLOProfile(flow_name=flow_name)
        changed = change(profile)
        return profile if changed is profile else _written(changed)


def _emptied(profile: SLOProfile) -> SLOProfile:
    fields = ("flow_name", "revision", "objective", "plan", "plan_history", "proposal", "declined")
    return SLOProfile(**{name: getattr(profile, name) for name in fields})


def _fitted(profile: SLOProfile, fit: Fit) -> SLOProfile:
    """The profile with its model fitted again; what keeps it from fitting is noted, never raised."""
    workflow, training = profile.workflow(), profile.training()
    if workflow is None or training is None or not len(training.stage_runs):
        return profile.with_model(None, "no completed run yet")
    try:
        return profile.with_model(fit(workflow, training.stage_runs, training.run_latency_s))
    except SloError as error:
        return profile.with_model(None, str(error))
    except Exception as error:
        _logger.warning("The model of %s could not be fitted (%s: %s).", profile.flow_name, type(error).__name__, error)
        return profile.with_model(None, f"{type(error).__name__}: {error}")


def _written(profile: SLOProfile, fit: Fit = fit_model) -> SLOProfile:
    """Save the next revision, within the size that a block may have."""
    profile = within_size(profile.model_copy(update={"revision": profile.revision + 1}), fit)
    try:
        profile.store()
    except ObjectAlreadyExists:  # another flow's first profile has registered the block type meanwhile
        profile.store()
    return profile


def within_size(profile: SLOProfile, fit: Fit = fit_model) -> SLOProfile:
    """A profile of at most ``MAX_BYTES``.

    Its rows give way first, with the model fitted to those that stay. Where the model is too large even so, it is left
    out, and fitted to the rows by whoever needs it.
    """
    whole = profile
    while profile.size_bytes > MAX_BYTES and profile.model and (rows := _rows(profile)) > LEAST_ROWS:
        profile = _fitted(profile.with_row_budget(max(rows // 2, LEAST_ROWS)), fit)
    if profile.size_bytes > MAX_BYTES and profile.model:
        profile = whole.with_model(None, OUTGROWN)
    while profile.size_bytes > MAX_BYTES and (rows := _rows(profile)) > 1:
        profile = profile.with_row_budget(rows // 2)
    return profile


def _rows(profile: SLOProfile) -> int:
    ledger = profile.ledger()
    return min(ledger.row_budget, ledger.rows)


def _with_rows_from_elsewhere(profile: SLOProfile, stored: tuple[Stored, ...], api: SyncPrefectClient) -> SLOProfile:
    """Absorb the runs and, for code that is new to this flow, what other flows' profiles know of it.

    The rows are appended to this flow's own artifacts first, so that a rebuild finds them.
    """
    before = set(_codes(profile.ledger()))
    profile = profile.absorbed(stored)
    fresh = set(_codes(profile.ledger())) - before
    rows = known_elsewhere(profile.flow_name, fresh, api) if fresh else ()
    new = profile.new_among([Stored(created=_latest(profile), records=rows)]) if rows else ()
    if not new:
        return profile
    publish(profile.flow_name, new, api)
    return profile.absorbed(read_runs(profile.flow_name, since=profile.since, client=api))


def _codes(ledger: Ledger) -> set[tuple[str, str]]:
    return {(code.task_key, code.source_hash) for code in ledger.groups}


def _latest(profile: SLOProfile) -> datetime:
    return datetime.fromisoformat(profile.cursor) if profile.cursor else datetime.fromtimestamp(0, UTC)

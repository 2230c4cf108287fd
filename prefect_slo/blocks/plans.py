"""Which plan is in force, and which ones were: each is kept as an artifact, so that there is a way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterId
from prefect.client.schemas.sorting import ArtifactSort

from prefect_slo.blocks.folding import update_profile
from prefect_slo.blocks.profile import HISTORY, SLOProfile
from prefect_slo.errors import InvalidPlan
from prefect_slo.plan import Plan
from prefect_slo.telemetry.api import api_client
from prefect_slo.telemetry.packing import canonical, digest
from prefect_slo.telemetry.store import slug


def put_in_force(
    flow_name: str, plan: Plan | None, reason: str, *, timeout_s: float = 120.0, revision: int | None = None,
    proposal: str = "", decline: Iterable[str] = (), accept: Iterable[str] = (),
) -> SLOProfile:  # fmt: skip
    """Make a plan the one that runs follow, or ``None`` to follow none; the history says when and why.

    Args:
        flow_name: Name of the flow.
        plan: The plan.
        reason: Why it is put in force.
        timeout_s: How long to wait for another writer.
        revision: Of the profile that the plan was made by. Where another one is stored by now nothing is changed, and
            that profile is returned: a plan by older observations never replaces one by newer ones.
        proposal: Name of the proposal that the plan was; where that waits no more nothing is changed either.
        decline: Names of choices that no re-plan may put in force from now on without being asked to.
        accept: Names of choices that it may again.

    Raises:
        TimeoutError: Another writer took too long.
        httpx.HTTPError: The API cannot be reached, or refuses.
    """
    decline, accept = tuple(decline), frozenset(accept)

    def change(profile: SLOProfile) -> SLOProfile:
        if revision not in (None, profile.revision) or proposal not in ("", profile.proposed):
            return profile
        document = plan.to_document() if plan is not None else None
        entry = {"revision": profile.revision + 1, "reason": reason, "artifact": None, "digest": None}
        if document is not None:
            entry |= {"artifact": str(_keep_plan(flow_name, document, reason)), "digest": digest(document)}
        history = [*profile.plan_history, entry][-HISTORY:]
        declined = [name for name in dict.fromkeys([*profile.declined, *decline]) if name not in accept][-HISTORY:]
        changes = {"plan": document, "plan_history": history, "proposal": None, "declined": declined}
        return profile.model_copy(update=changes)

    return update_profile(flow_name, change, timeout_s=timeout_s)


def propose(
    flow_name: str, plan: Plan, reason: str, name: str, *, timeout_s: float = 120.0, revision: int | None = None
) -> SLOProfile:
    """Keep a plan for somebody to approve; the one in force stays. It is gone once any other plan comes into force.

    Args:
        flow_name: Name of the flow.
        plan: The plan.
        reason: Why it was made, and why it is not in force.
        name: Names its choices.
        timeout_s: How long to wait for another writer.
        revision: As of ``put_in_force``.

    Raises:
        TimeoutError: Another writer took too long.
        httpx.HTTPError: The API cannot be reached, or refuses.
    """

    def change(profile: SLOProfile) -> SLOProfile:
        if revision not in (None, profile.revision):
            return profile
        return profile.model_copy(update={"proposal": {"plan": plan.to_document(), "reason": reason, "name": name}})

    return update_profile(flow_name, change, timeout_s=timeout_s)


def plan_from_history(entry: Mapping[str, Any]) -> Plan | None:
    """The plan of an entry of ``SLOProfile.plan_history``, to roll back to; ``None`` where no plan was in force.

    Raises:
        InvalidPlan: The artifact that held it is gone.
    """
    if not entry.get("artifact"):
        return None
    with api_client() as client:
        wanted = ArtifactFilter(id=ArtifactFilterId(any_=[UUID(entry["artifact"])]))
        found = client.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.ID_DESC, limit=1)
    if not found:
        raise InvalidPlan("plan_history.artifact", entry["artifact"], "an artifact that still exists")
    return Plan.from_json(str(found[0].data))


def _keep_plan(flow_name: str, document: Mapping[str, Any], reason: str) -> UUID:
    key = f"slo-history-{slug(flow_name)}"
    request = ArtifactCreate(key=key, type="slo-plan", description=reason, data=canonical(document))
    with api_client() as client:
        return client.create_artifact(request).id

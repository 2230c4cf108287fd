"""Plans and runs as Prefect artifacts. A failure to publish never reaches the flow: it is logged once."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from prefect_slo.artifacts.forecast import RunActual, StageForecast
from prefect_slo.artifacts.plan_view import plan_markdown, plan_table
from prefect_slo.artifacts.proposal_view import proposal_markdown, settled_markdown
from prefect_slo.artifacts.run_view import attainment_markdown
from prefect_slo.attainment import Attainment
from prefect_slo.plan import Plan
from prefect_slo.telemetry.store import slug
from prefect_slo.workflow import Workflow

if TYPE_CHECKING:
    from prefect.client.schemas.actions import ArtifactCreate

_failures: Counter[str] = Counter()


def publish_plan(
    flow_name: str,
    plan: Plan,
    *,
    workflow: Workflow,
    forecasts: Mapping[str, StageForecast] | None = None,
    flow_run_id: UUID | None = None,
) -> tuple[UUID, ...]:
    """Publish the table ``slo-plan-<flow>`` and the graph ``slo-graph-<flow>``.

    Blocks for two API writes; call it from a thread where an event loop is running.

    Args:
        flow_name: Name of the flow; part of the artifacts' keys, so that each plan is a version of the one before.
        plan: The plan.
        workflow: The graph it was made for.
        forecasts: What it predicts of its stages.
        flow_run_id: Run that the artifacts belong to, where there is one.

    Returns:
        Ids of the artifacts; none where the API could not be reached.
    """
    asked = f"Asked: {plan.objective}." if plan.objective else "No bound was asked for."
    return _publish(
        lambda: [
            _artifact("table", key("plan", flow_name), json.dumps(plan_table(plan, forecasts)), asked, flow_run_id),
            _artifact(
                "markdown", key("graph", flow_name), plan_markdown(plan, workflow, forecasts), asked, flow_run_id
            ),
        ]
    )


def publish_proposal(
    flow_name: str,
    before: Plan,
    after: Plan,
    *,
    name: str,
    reason: str,
    objection: str,
    flow_run_id: UUID | None = None,
) -> tuple[UUID, ...]:
    """Publish a plan that waits for approval as ``slo-proposal-<flow>``.

    Blocks for one API write; call it from a thread where an event loop is running.

    Args:
        flow_name: Name of the flow; part of the artifact's key.
        before: The plan in force, with what is predicted of it now.
        after: The plan that is proposed.
        name: Names it, for whoever approves it.
        reason: Why it was made.
        objection: Why it was not adopted.
        flow_run_id: Run that the artifact belongs to, where there is one.

    Returns:
        Id of the artifact; none where the API could not be reached.
    """
    text = proposal_markdown(flow_name, before, after, name=name, reason=reason, objection=objection)
    told = f"Plan {name} waits for approval."
    return _publish(lambda: [_artifact("markdown", key("proposal", flow_name), text, told, flow_run_id)])


def publish_settled(flow_name: str, became: str, *, flow_run_id: UUID | None = None) -> tuple[UUID, ...]:
    """Publish, as the newest version of ``slo-proposal-<flow>``, that no plan waits for approval any more.

    Blocks for one API write; call it from a thread where an event loop is running.

    Args:
        flow_name: Name of the flow; part of the artifact's key.
        became: What became of the plan that waited.
        flow_run_id: Run that the artifact belongs to, where there is one.

    Returns:
        Id of the artifact; none where the API could not be reached.
    """
    text, told = settled_markdown(flow_name, became), f"No plan waits: the last one {became}."
    return _publish(lambda: [_artifact("markdown", key("proposal", flow_name), text, told, flow_run_id)])


def publish_attainment(
    flow_name: str,
    plan: Plan,
    actual: RunActual,
    *,
    attainment: Attainment,
    forecasts: Mapping[str, StageForecast] | None = None,
    history: Sequence[RunActual] = (),
    flow_run_id: UUID | None = None,
    note: str = "",
) -> tuple[UUID, ...]:
    """Publish predicted against actual of one run as ``slo-attainment-<flow>``.

    Blocks for one API write; call it from a thread where an event loop is running.

    Args:
        flow_name: Name of the flow; part of the artifact's key, so that each run is a version of the one before.
        plan: The plan that was run.
        actual: What the run took.
        attainment: Over all runs so far, this one included.
        forecasts: What the plan predicted of its stages.
        history: Earlier runs, oldest first.
        flow_run_id: Run that the artifact belongs to, where there is one.
        note: Why the run went by this plan, where that has to be said.

    Returns:
        Id of the artifact; none where the API could not be reached.
    """
    told = f"Predicted against actual; {attainment.met} of {attainment.runs} runs kept the bound."
    return _publish(
        lambda: [
            _artifact(
                "markdown",
                key("attainment", flow_name),
                attainment_markdown(
                    plan, actual, attainment=attainment, forecasts=forecasts, history=history, note=note
                ),
                told,
                flow_run_id,
            )
        ]
    )


def key(kind: str, flow_name: str) -> str:
    """An artifact key: lowercase letters, digits and dashes, which is all that the API takes; one per flow name.

    >>> key("plan", "my-flow")
    'slo-plan-my-flow'
    >>> key("plan", "My Flow")
    'slo-plan-my-flow-a99f90'
    """
    return f"slo-{kind}-{slug(flow_name)}"


def _artifact(kind: str, name: str, data: str, description: str, flow_run_id: UUID | None) -> ArtifactCreate:
    from prefect.client.schemas.actions import ArtifactCreate

    return ArtifactCreate(key=name, type=kind, description=description, data=data, flow_run_id=flow_run_id)


def _publish(render: Callable[[], list[ArtifactCreate]]) -> tuple[UUID, ...]:
    """Create the artifacts; whatever goes wrong is logged as a warning the first time, and counted after that."""
    from prefect.logging import get_logger

    from prefect_slo.telemetry.api import api_client

    try:
        artifacts = render()
        with api_client() as client:
            return tuple(client.create_artifact(artifact).id for artifact in artifacts)
    except Exception as error:
        name = type(error).__name__
        _failures[name] += 1
        level = logging.WARNING if _failures[name] == 1 else logging.DEBUG
        get_logger("slo").log(
            level, "An artifact was not published (%s: %s; %d so far). The run goes on.", name, error, _failures[name]
        )
        return ()

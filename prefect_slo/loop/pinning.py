"""The plan that a run is pinned to, above the one in force: by its environment, or by a parameter of its own.

``PREFECT_INTEGRATIONS_SLO_PLAN`` names a stored ``slo-plan`` block or a plan file. A deployment has it in its job
variable ``env``, which Prefect merges with that of a run, so that a run may have another one, or none (an empty text).
It pins the flow that the plan was made for, and leaves flows alone that this one calls. A flow that declares a
parameter ``slo_plan`` takes it from there, be it a name, a path or a whole plan document: Prefect then shows it in the
form of a run, and a deployment's default is overridden as that of any parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect_slo.errors import InvalidPlan
from prefect_slo.plan import Plan
from prefect_slo.settings import SLOSettings

PARAMETER = "slo_plan"
VARIABLE = "PREFECT_INTEGRATIONS_SLO_PLAN"
EXPECTED = "the name of an slo-plan block, a path that ends in .json, or a plan document"


def pinned(flow_name: str, parameters: Mapping[str, Any]) -> Plan | None:
    """The plan that a run is pinned to; ``None`` where it is free.

    Args:
        flow_name: Name of the flow.
        parameters: Of the run.

    Raises:
        InvalidPlan: There is no such plan, or it is none.
        httpx.HTTPError: The API cannot be reached.
    """
    own = parameters.get(PARAMETER)
    if own is not None:
        return plan_of(own) if own else None
    named = SLOSettings().plan
    if not named:
        return None
    plan = plan_of(named)
    return plan if plan.workflow == flow_name else None


def plan_of(value: object) -> Plan:
    """The plan that a name, a path or a document means.

    Raises:
        InvalidPlan: There is none.
        httpx.HTTPError: The API cannot be reached.
    """
    match value:
        case Plan():
            return value
        case Mapping():
            return Plan.from_document(value)
        case str() if value.lstrip().startswith("{"):
            return Plan.from_json(value)
        case str() if value.endswith(".json"):
            try:
                return Plan.from_json(Path(value).expanduser().read_text(encoding="utf-8"))
            except OSError as error:
                raise InvalidPlan("plan", value, f"a file that can be read ({error.strerror})") from None
        case str() if value.strip():
            return _stored(value.strip())
    raise InvalidPlan("plan", value, EXPECTED)


def _stored(name: str) -> Plan:
    from prefect_slo.blocks import PlanBlock

    try:
        block: Any = PlanBlock.load(name.removeprefix("slo-plan/"), _sync=True)  # type: ignore[call-arg]
        plan: Plan = block.plan
        return plan
    except ValueError as error:
        raise InvalidPlan("plan", name, f"{EXPECTED} ({error})") from None

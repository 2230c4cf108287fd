"""What a deployment is told of a plan: which one its runs follow, and how large the flow's own process is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound

from prefect_slo.blocks import PlanBlock, SLOProfile
from prefect_slo.errors import InvalidValue, NothingProposed
from prefect_slo.loop.menus import GPU
from prefect_slo.loop.pinning import VARIABLE
from prefect_slo.loop.replanning import plan_digest
from prefect_slo.placement import Device
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.planner.overlap import Order, heaviest, waits
from prefect_slo.planner.placing import devices_at_once
from prefect_slo.resources import Option, Size
from prefect_slo.runner.pools import LOCAL, PROCESS, THREAD
from prefect_slo.runner.workpool.jobs import work_pool
from prefect_slo.runner.workpool.sizing import checked, job_variables, merged
from prefect_slo.telemetry.api import api_client
from prefect_slo.telemetry.store import slug
from prefect_slo.workflow import Workflow

OWN = Size(1, 1024)
"""What the flow's own process takes beside its workers: Prefect's engine, the runner, what the flow itself holds."""


@dataclass(frozen=True)
class Pinning:
    """What a deployment is told.

    Attributes:
        deployment: Its name, ``flow/deployment``.
        block: Name of the ``slo-plan`` block that holds the plan.
        plan: The plan.
        size: Of the flow's own process.
        sized: Whether jobs are told the size: not all types of work pool have variables for it.
        before: Name of the block that it was pinned to before; empty where it wasn't.
        job_variables: Those of the deployment, with what is told.
    """

    deployment: str
    block: str
    plan: Plan
    size: Size
    sized: bool
    job_variables: Mapping[str, Any]
    before: str = ""


def pin(deployment: str, plan: Plan | None = None, *, apply: bool = True) -> Pinning:
    """Have a deployment's runs follow a plan in jobs that hold what it takes of the flow's own machine.

    Args:
        deployment: Its name, ``flow/deployment``.
        plan: The plan; by default the one in force.
        apply: Whether the plan is stored and the deployment changed, or only told how.

    Raises:
        InvalidValue: There is no such deployment, or it has no work pool.
        NothingProposed: The flow has no plan in force.
        WorkPoolUnusable: The pool of the deployment is gone, or can't be told the size.
    """
    with api_client() as client:
        found = _deployment(client, deployment)
        pool = work_pool(client, str(found.work_pool_name))
        flow_name = deployment.partition("/")[0]
        profile = SLOProfile.of_flow(flow_name, client)
        plan = plan or (profile.plan_in_force() if profile is not None else None)
        if plan is None:
            then = "Profile it first (prefect-slo profile), or pin a plan file (--plan)."
            raise NothingProposed(flow_name, "no plan is in force", then)
        plan = replace(plan, workflow=flow_name)
        size = own_size(plan, profile.workflow() if profile is not None else None)
        name = f"{slug(flow_name)}-{plan_digest(plan)[:8]}"
        given = dict(found.job_variables or {})
        before = str((given.get("env") or {}).get(VARIABLE) or "")
        given["env"] = {**(given.get("env") or {}), VARIABLE: name}
        sized = job_variables(checked(pool, None, [size], {"env": given["env"]}), size)
        told = Pinning(deployment, name, plan, size, bool(sized), merged(given, sized), before)
        if apply:
            PlanBlock(document=plan.to_document()).save(name, overwrite=True, _sync=True)  # type: ignore[call-arg]
            client.update_deployment(found.id, DeploymentUpdate(job_variables=dict(told.job_variables)))
    return told


def unpin(deployment: str) -> bool:
    """Leave a deployment's runs to the plan in force; its size stays. Whether it was pinned.

    Raises:
        InvalidValue: There is no such deployment, or it has no work pool.
    """
    with api_client() as client:
        found = _deployment(client, deployment)
        given = dict(found.job_variables or {})
        env = dict(given.get("env") or {})
        if VARIABLE not in env:
            return False
        del env[VARIABLE]
        client.update_deployment(found.id, DeploymentUpdate(job_variables={**given, "env": env}))
    return True


def own_size(plan: Plan, workflow: Workflow | None = None) -> Size:
    """What the flow's own process and its workers hold at most: those of stages that can run at the same time.

    Stages on other pools hold nothing here. Threads share one interpreter: a stage of them counts for one vCPU, and
    for the memory of one worker. Of GPUs it is as many whole ones as the shares of such stages find their places on.

    Args:
        plan: The plan.
        workflow: The graph; without it every stage may run beside every other.
    """
    known = workflow is not None and set(workflow.order) == set(plan.stages)
    names = workflow.order if workflow is not None and known else tuple(plan.stages)
    order: Order = waits(workflow) if workflow is not None and known else frozenset()
    held = [_held(plan[name]) for name in names]
    vcpus, memory_mb = (heaviest([each[i] for each in held], order) for i in (0, 1))
    options = [_on_own_gpus(plan[name]) for name in names]
    gpus = _gpus(options, order, (workflow.capacity.gpu_devices if workflow is not None else None) or ())
    own = Size(OWN.vcpus + vcpus, OWN.memory_mb + int(memory_mb))
    return replace(own, gpu=float(gpus), hardware=GPU) if gpus else own


def _held(stage: StagePlan) -> tuple[float, float]:
    if stage.pool not in LOCAL:
        return 0.0, 0.0
    workers = 1 if LOCAL[stage.pool] == THREAD or stage.size.hardware == THREAD else stage.workers
    return workers * stage.size.vcpus, float(workers * stage.size.memory_mb)


def _on_own_gpus(stage: StagePlan) -> Option:
    """A stage's option with what it takes of the flow's own GPUs."""
    own = LOCAL.get(stage.pool) == PROCESS
    return stage.option if own else replace(stage.option, size=stage.size.without_gpu)


def _gpus(options: Sequence[Option], order: Order, there: Sequence[Device]) -> int:
    """How many devices it takes: of the smallest kind that was planned for, where that is known and holds each share.

    Of others nothing is known but that a share takes its part of the cores.
    """
    shares = [option.size.share for option in options if option.size.share is not None]
    holding = [device for device in there if all(share.weight(device) <= 1 for share in shares)]
    if holding:
        return devices_at_once(options, order, min(holding, key=lambda device: (device.memory_mb, device.cores)))
    bare = [replace(option, size=replace(option.size, gpu_memory_mb=0)) for option in options]
    return devices_at_once(bare, order, Device("any", 1.0))


def _deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse:
    try:
        found = client.read_deployment_by_name(name)
    except (ObjectNotFound, ValueError):
        raise InvalidValue("deployment", name, "flow/deployment, as 'prefect deployment ls' shows it") from None
    if found.work_pool_name is None:
        hint = (
            f"one in a work pool; flows that are served take {VARIABLE} from the environment of the process that serves"
        )
        raise InvalidValue("deployment", name, hint)
    return found

"""Give a Prefect flow a deadline or a budget; it sizes itself."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_slo.aws.batch import BatchJobs as BatchJobs
    from prefect_slo.aws.queues import BatchQueue as BatchQueue
    from prefect_slo.blocks import SLOProfile as SLOProfile
    from prefect_slo.declaration import slo_task as slo_task
    from prefect_slo.decorators import slo as slo
    from prefect_slo.models import WorkflowModel as WorkflowModel
    from prefect_slo.objective import Budget as Budget
    from prefect_slo.objective import Latency as Latency
    from prefect_slo.objective import Slo as Slo
    from prefect_slo.plan import Plan as Plan
    from prefect_slo.planner import make_plan as make_plan
    from prefect_slo.runner.aws_pools import BatchPool as BatchPool
    from prefect_slo.runner.aws_pools import LambdaPool as LambdaPool
    from prefect_slo.runner.cluster_pools import DaskPool as DaskPool
    from prefect_slo.runner.cluster_pools import RayPool as RayPool
    from prefect_slo.runner.task_runner import SLOTaskRunner as SLOTaskRunner
    from prefect_slo.runner.work_pools import WorkPool as WorkPool
    from prefect_slo.workflow import Workflow as Workflow

__version__ = "0.1.0"

_HOME = {
    "BatchJobs": "aws.batch",
    "BatchPool": "runner.aws_pools",
    "BatchQueue": "aws.queues",
    "Budget": "objective",
    "DaskPool": "runner.cluster_pools",
    "InfeasibleSlo": "errors",
    "LambdaPool": "runner.aws_pools",
    "Latency": "objective",
    "MenuBlock": "blocks",
    "Plan": "plan",
    "PriceListBlock": "blocks",
    "RayPool": "runner.cluster_pools",
    "SLOProfile": "blocks",
    "SLOTaskRunner": "runner.task_runner",
    "Slo": "objective",
    "SloError": "errors",
    "WorkPool": "runner.work_pools",
    "Workflow": "workflow",
    "WorkflowModel": "models",
    "make_plan": "planner",
    "slo": "decorators",
    "slo_task": "declaration",
}
"""Public names and the modules that they are imported from when first asked for."""


if _folder := os.environ.get("PREFECT_INTEGRATIONS_SLO_PRICES"):
    import_module(f"{__name__}.pricing").look_first_in(_folder)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

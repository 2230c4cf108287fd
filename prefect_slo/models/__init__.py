"""How long and how dear stages and whole runs are: distributions learned from stage runs."""

from prefect_slo.models.makespan import makespan
from prefect_slo.models.runs import PlanPrediction, PlanSamples
from prefect_slo.models.stage_time import StageTime
from prefect_slo.models.tables import SampleTables, StageTable
from prefect_slo.models.workflow_model import WorkflowModel

__all__ = ["PlanPrediction", "PlanSamples", "SampleTables", "StageTable", "StageTime", "WorkflowModel", "makespan"]

"""Other planners through the same interface: ``(model, objective, *, seed) -> Plan`` without a certificate."""

from prefect_slo.planner.baselines.extremes import all_max, all_min
from prefect_slo.planner.baselines.uniform import uniform

__all__ = ["all_max", "all_min", "uniform"]

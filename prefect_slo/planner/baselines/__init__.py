"""Other planners through the same interface: ``(model, objective, *, seed) -> Plan`` without a certificate."""

from prefect_slo.planner.baselines.caerus import caerus
from prefect_slo.planner.baselines.ditto import ditto_cost, ditto_latency
from prefect_slo.planner.baselines.extremes import all_max, all_min
from prefect_slo.planner.baselines.jolteon import jolteon
from prefect_slo.planner.baselines.orion import orion
from prefect_slo.planner.baselines.power_tuning import power_tuning
from prefect_slo.planner.baselines.uniform import uniform

__all__ = [
    "all_max", "all_min", "caerus", "ditto_cost", "ditto_latency", "jolteon", "orion", "power_tuning", "uniform",
]  # fmt: skip

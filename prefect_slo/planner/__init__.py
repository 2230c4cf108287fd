"""Certified plans: relax, search, certify, explain."""

from prefect_slo.planner.goals import Balanced
from prefect_slo.planner.make import make_plan

__all__ = ["Balanced", "make_plan"]

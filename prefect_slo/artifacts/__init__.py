"""What a user sees of a plan and of its runs in the Prefect UI."""

from __future__ import annotations

from prefect_slo.artifacts.forecast import RunActual, StageForecast, stage_forecasts
from prefect_slo.artifacts.plan_view import graph_mermaid, plan_markdown, plan_table
from prefect_slo.artifacts.publishing import publish_attainment, publish_plan
from prefect_slo.artifacts.run_view import attainment_markdown

__all__ = [
    "RunActual",
    "StageForecast",
    "attainment_markdown",
    "graph_mermaid",
    "plan_markdown",
    "plan_table",
    "publish_attainment",
    "publish_plan",
    "stage_forecasts",
]

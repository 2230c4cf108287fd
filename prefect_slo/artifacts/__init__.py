"""What a user sees of a plan and of its runs in the Prefect UI."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOME = {
    "RunActual": "forecast",
    "StageForecast": "forecast",
    "attainment_markdown": "run_view",
    "graph_mermaid": "plan_view",
    "plan_markdown": "plan_view",
    "plan_table": "plan_view",
    "publish_attainment": "publishing",
    "publish_plan": "publishing",
    "stage_forecasts": "forecast",
}
"""Modules that the names are imported from when first asked for: ``artifacts.text`` alone loads nothing heavy."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value

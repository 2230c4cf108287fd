"""One run of a plan, predicted against actual, and how the bound was kept so far: values in, Markdown out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from prefect_slo.artifacts.charts import data_uri, runs_chart
from prefect_slo.artifacts.forecast import RunActual, StageForecast
from prefect_slo.artifacts.text import cell_text, dollars_text, seconds_text, share_text
from prefect_slo.attainment import Attainment
from prefect_slo.plan import Plan


def attainment_markdown(
    plan: Plan,
    actual: RunActual,
    *,
    attainment: Attainment,
    forecasts: Mapping[str, StageForecast] | None = None,
    history: Sequence[RunActual] = (),
    note: str = "",
) -> str:
    """Predicted against actual of one run, and how the bound was kept so far.

    Args:
        plan: The plan that was run.
        actual: What the run took.
        attainment: Over all runs so far, this one included.
        forecasts: What the plan predicted of its stages.
        history: Earlier runs, oldest first; drawn with this one as the last.
        note: Why the run went by this plan, where that has to be said.
    """
    lines = [
        f"## {_verdict(plan, actual)}",
        *(["", note] if note else []),
        "",
        "| stage | predicted mean | predicted p95 | actual | difference |",
        "|---|--:|--:|--:|---|",
    ]
    forecasts = forecasts or {}
    for name in dict.fromkeys([*plan.stages, *actual.stages]):
        lines.append(_stage_row(name, forecasts.get(name), actual.stages.get(name)))
    lines += _run_rows(plan, actual)
    lines += ["", _attained(plan, attainment), ""]
    runs = [*history, actual]
    if plan.objective is not None and len(runs) > 1:
        lines.append(_chart(plan, runs))
    return "\n".join(lines) + "\n"


def _verdict(plan: Plan, actual: RunActual) -> str:
    if plan.objective is None:
        return f"Ran in {seconds_text(actual.latency_s)} (no bound was asked for)"
    parts, met = [], True
    if latency := plan.objective.latency:
        met &= actual.latency_s <= latency.bound_s
        parts.append(f"{seconds_text(actual.latency_s)} of {seconds_text(latency.bound_s)}")
    if budget := plan.objective.budget:
        met &= actual.cost_usd <= budget.bound_usd
        parts.append(f"{dollars_text(actual.cost_usd)} of {dollars_text(budget.bound_usd)}")
    return f"{'Met' if met else 'Missed'}: {', '.join(parts)}"


def _stage_row(name: str, forecast: StageForecast | None, actual_s: float | None) -> str:
    mean, p95 = (forecast.mean_s, forecast.p95_s) if forecast else (math.nan, math.nan)
    verdict = "did not run" if actual_s is None else _against(actual_s, mean, p95)
    shown = seconds_text(math.nan if actual_s is None else actual_s)
    return f"| {cell_text(name)} | {seconds_text(mean)} | {seconds_text(p95)} | {shown} | {verdict} |"


def _run_rows(plan: Plan, actual: RunActual) -> list[str]:
    nan = (math.nan, math.nan)
    latency = (plan.predicted.latency_s.mean, plan.predicted.latency_s.p95) if plan.predicted else nan
    cost = (plan.predicted.cost_usd.mean, plan.predicted.cost_usd.p95) if plan.predicted else nan
    return [
        f"| **run** | {seconds_text(latency[0])} | {seconds_text(latency[1])} | **{seconds_text(actual.latency_s)}** | "
        f"{_against(actual.latency_s, *latency)} |",
        f"| **cost** | {dollars_text(cost[0])} | {dollars_text(cost[1])} | "
        f"**{dollars_text(actual.cost_usd)}**{_beside(actual)} | {_against(actual.cost_usd, *cost)} |",
    ]


def _beside(actual: RunActual) -> str:
    return f" and {actual.untold} unknown bill{'s' * (actual.untold > 1)}" if actual.untold else ""


def _against(actual: float, mean: float, p95: float) -> str:
    """How an actual value compares with its forecast; empty where either is unknown."""
    if math.isnan(actual) or math.isnan(mean) or mean <= 0:
        return ""
    if actual > p95:
        return f"+{100 * (actual / mean - 1):.0f} %, beyond its p95"
    change = round(100 * (actual / mean - 1))
    return f"{'+' if change > 0 else '−'}{abs(change)} %" if change else "as predicted"


def _attained(plan: Plan, attainment: Attainment) -> str:
    if plan.objective is None or attainment.runs == 0:
        return "No run has been counted against a bound yet."
    low, high = attainment.interval(0.95)
    return (
        f"**Kept so far**: {attainment.met} of {attainment.runs} runs, {share_text(attainment.share)} "
        f"(95 % interval {share_text(low)} to {share_text(high)}); asked for {share_text(plan.objective.percentile)}."
    )


def _chart(plan: Plan, runs: Sequence[RunActual]) -> str:
    assert plan.objective is not None  # callers have looked
    latency = plan.objective.latency
    if latency is not None:
        values, bound, text = [run.latency_s for run in runs], latency.bound_s, seconds_text
        predicted = plan.predicted.latency_at_percentile_s if plan.predicted else math.nan
    else:
        assert plan.objective.budget is not None  # an objective has at least one bound
        values, bound, text = [run.cost_usd for run in runs], plan.objective.budget.bound_usd, dollars_text
        predicted = plan.predicted.cost_at_percentile_usd if plan.predicted else math.nan
    level = f"p{100 * plan.objective.percentile:g}"
    chart = runs_chart(values, bound=bound, predicted=predicted, predicted_name=f"predicted {level}", text=text)
    return f"![the last {min(len(runs), 60)} runs against the bound]({data_uri(chart)})"

"""A plan as a table, as Markdown and as a Mermaid graph: values in, text out."""

from __future__ import annotations

import math
from collections.abc import Mapping

from prefect_slo.artifacts.forecast import StageForecast
from prefect_slo.artifacts.text import cell_text, dollars_text, seconds_text, share_text, size_text
from prefect_slo.attainment import runs_for_claim
from prefect_slo.plan import Certificate, Plan, Prediction, StagePlan
from prefect_slo.workflow import Edge, Workflow

_CRITICAL = 0.5  # a stage that is more likely than not on the longest path is drawn as critical
_LONG = 4  # edges on the longest chain; the UI gives a graph about 700 pixels of width, five boxes side by side
_NBSP = "\u00a0"  # Mermaid wraps labels at 200 pixels wherever it finds a space


def plan_table(plan: Plan, forecasts: Mapping[str, StageForecast] | None = None) -> list[dict[str, object]]:
    """One row per stage: what the plan chose for it, and what it predicts where ``forecasts`` are given."""
    rows: list[dict[str, object]] = []
    for name, stage in plan.stages.items():
        row: dict[str, object] = {"stage": name, "workers": stage.workers, "each worker": size_text(stage.size)}
        if any(other.pool != "default" for other in plan.stages.values()):
            row["pool"] = stage.pool
        if any(other.batch > 1 for other in plan.stages.values()):
            row["batch"] = stage.batch
        if any(other.knobs for other in plan.stages.values()):
            row["knobs"] = ", ".join(f"{knob}={value}" for knob, value in stage.knobs)
        row["record"] = stage.record
        if forecasts is not None:
            forecast = forecasts.get(name, StageForecast(math.nan, math.nan))
            row["mean"] = seconds_text(forecast.mean_s)
            row["p95"] = seconds_text(forecast.p95_s)
            row["cost (mean)"] = dollars_text(forecast.cost_usd)
            row["on the critical path"] = share_text(forecast.critical)
        rows.append(row)
    return rows


def passing_table(plan: Plan) -> list[dict[str, object]]:
    """One row per edge: which way data pass along it, and what that and the next best way would take."""
    rows: list[dict[str, object]] = []
    for edge in plan.passing:
        other = edge.others[0] if edge.others else None
        rows.append(
            {
                "from": edge.source,
                "to": edge.sink,
                "way": edge.method,
                "data": f"{edge.size_mb:.3g} MB" + (" each" if edge.broadcast else ""),
                "takes": f"{seconds_text(edge.chosen.seconds)}, {dollars_text(edge.chosen.cost_usd)}",
                "next best": "–" if other is None else f"{other.method}: {seconds_text(other.seconds)}",
            }
        )
    return rows


def plan_markdown(plan: Plan, workflow: Workflow, forecasts: Mapping[str, StageForecast] | None = None) -> str:
    """What was asked, what is predicted and certified, and the graph of stages with its critical path."""
    lines = [f"## Plan for {cell_text(plan.workflow)}", ""]
    if plan.objective is not None:
        lines.append(f"- **Asked**: {_objective(plan)} in {share_text(plan.objective.percentile)} of runs.")
    if plan.predicted is not None:
        lines.append(f"- **Predicted**: {prediction_text(plan.predicted)}")
    lines.append(f"- **Certified**: {certificate_text(plan)}")
    lines += ["", "```mermaid", graph_mermaid(workflow, plan, forecasts), "```", ""]
    if forecasts and any(forecast.critical >= _CRITICAL for forecast in forecasts.values()):
        lines.append(
            "Orange stages are more likely than not on the critical path: time saved there is time saved in all."
        )
    return "\n".join(lines) + "\n"


def graph_mermaid(
    workflow: Workflow, plan: Plan | None = None, forecasts: Mapping[str, StageForecast] | None = None
) -> str:
    """The stages as a Mermaid flowchart; item-wise edges are thick and labelled, critical stages orange.

    Drawn from the top where the longest chain is too long to be read from left to right.
    """
    import networkx as nx

    forecasts = forecasts or {}
    ids = {name: f"s{i}" for i, name in enumerate(workflow.order)}
    lines = [f"flowchart {'TB' if nx.dag_longest_path_length(workflow.graph) >= _LONG else 'LR'}"]
    for name in workflow.order:
        label = [f"<b>{_escape(name)}</b>"]
        if plan is not None and name in plan.stages:
            label.append(_escape(_size_line(plan.stages[name])))
        if name in forecasts:
            label.append(f"{seconds_text(forecasts[name].mean_s)}, p95 {seconds_text(forecasts[name].p95_s)}")
        critical = forecasts[name].critical >= _CRITICAL if name in forecasts else False
        lines.append(
            f'    {ids[name]}["{"<br/>".join(label).replace(" ", _NBSP)}"]{":::critical" if critical else ":::stage"}'
        )
    for stage in workflow.stages:
        lines += [_edge(ids[edge.parent], ids[stage.name], edge, stage.probability) for edge in stage.after]
    lines += [
        "    classDef stage fill:#dde5ee,stroke:#8a99ad,color:#1c2733",
        "    classDef critical fill:#e69f00,stroke:#a87400,color:#1c2733",
    ]
    return "\n".join(lines)


def _objective(plan: Plan) -> str:
    assert plan.objective is not None  # callers have looked
    bounds = []
    if plan.objective.latency:
        bounds.append(f"at most {seconds_text(plan.objective.latency.bound_s)}")
    if plan.objective.budget:
        bounds.append(f"at most {dollars_text(plan.objective.budget.bound_usd)}")
    return " and ".join(bounds)


def prediction_text(predicted: Prediction) -> str:
    """Predicted latency and cost in words."""
    latency, cost = predicted.latency_s, predicted.cost_usd
    return (
        f"latency {seconds_text(latency.mean)} on average, p95 {seconds_text(latency.p95)}, "
        f"p99 {seconds_text(latency.p99)}; cost {dollars_text(cost.mean)} on average, p95 {dollars_text(cost.p95)}."
    )


def certificate_text(plan: Plan) -> str:
    """What is certified about a plan in words: under the model, and in your runs."""
    certificate = plan.certificate
    if certificate is None or plan.objective is None:
        return "nothing; this plan was not checked against a bound."
    allowed = share_text(1 - plan.objective.percentile)
    broke = certificate.violations / certificate.samples
    return (
        f"under the model, with {share_text(certificate.confidence)} confidence ({share_text(broke)} of "
        f"{certificate.samples:,} fresh samples broke the bound; {allowed} may). {_optimality(certificate)} "
        f"In your runs: {_calibration(plan, certificate)}"
    )


_NONE_BETTER = "On the samples of the search, no plan that leaves as much room to its bound is better"
"""What a gap says: the best plan that can be promised was searched with the room that it needs, on these samples."""


def _optimality(certificate: Certificate) -> str:
    if certificate.gap <= 1e-9:
        return f"{_NONE_BETTER}."
    return f"{_NONE_BETTER} by more than {share_text(certificate.gap)}."


def _calibration(plan: Plan, certificate: Certificate) -> str:
    assert plan.objective is not None  # callers have looked
    needed = runs_for_claim(plan.objective.percentile, plan.objective.confidence)
    if certificate.calibration_runs >= needed:
        return f"calibrated on {certificate.calibration_runs} runs."
    return f"no claim yet; {certificate.calibration_runs} of the {needed} runs that it takes."


def _size_line(stage: StagePlan) -> str:
    gpu = f", {stage.size.gpu:g} {stage.size.hardware}" if stage.size.gpu else ""
    pool = f" on {stage.pool}" if stage.pool != "default" else ""
    batch = f", batches of {stage.batch}" if stage.batch > 1 else ""
    return f"{stage.workers} × {stage.size.vcpus:.3g} vCPU{gpu}{pool}{batch}"


def _edge(parent: str, child: str, edge: Edge, probability: float) -> str:
    labels = (["item by item"] if edge.kind == "item" else []) + ([share_text(probability)] if probability < 1 else [])
    arrow = "==>" if edge.kind == "item" else "-->"
    label = f"|{', '.join(labels)}|" if labels else ""
    return f"    {parent} {arrow}{label} {child}"


def _escape(text: str) -> str:
    """Text inside a quoted Mermaid label: entities for what HTML or Mermaid would read as markup."""
    named = {"&": "#amp;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "#": "#35;", "`": "#96;"}
    return "".join(named.get(character, character) for character in text).replace("\n", " ")

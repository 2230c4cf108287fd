"""A plan that waits for approval beside the one in force, in markdown."""

from __future__ import annotations

from prefect_slo.artifacts.text import dollars_text, seconds_text
from prefect_slo.plan import Plan, StagePlan


def proposal_markdown(flow_name: str, before: Plan, after: Plan, reason: str) -> str:
    """What would change, what that is predicted to do, and how it is approved or left alone.

    Args:
        flow_name: Name of the flow.
        before: The plan in force.
        after: The plan that is proposed.
        reason: Why it was made, and why it was not adopted.
    """
    lines = [
        f"# A plan of {flow_name} waits for approval",
        "",
        f"{reason[:1].upper()}{reason[1:]}.",
        "",
        "| stage | in force | proposed |",
        "|---|---|---|",
    ]
    for stage in dict.fromkeys([*before.stages, *after.stages]):
        old, new = _words(before.stages.get(stage)), _words(after.stages.get(stage))
        lines.append(f"| {stage} | {old} | {'' if new == old else new} |")
    if before.predicted is not None and after.predicted is not None:
        pairs = [
            ("latency at the percentile", seconds_text, "latency_at_percentile_s"),
            ("cost at the percentile", dollars_text, "cost_at_percentile_usd"),
        ]
        lines += ["", "| predicted | in force | proposed |", "|---|---|---|"]
        for name, words, field in pairs:
            lines.append(
                f"| {name} | {words(getattr(before.predicted, field))} | {words(getattr(after.predicted, field))} |"
            )
    lines += [
        "",
        f"Approve it by `prefect-slo approve {flow_name!r}`, or by a run of `slo-replan` with `approve=true`. Until",
        "then, and unless another plan comes into force, runs follow the plan that is.",
    ]
    return "\n".join(lines)


def _words(stage: StagePlan | None) -> str:
    if stage is None:
        return "–"
    pool = f" on {stage.pool}" if stage.pool not in ("default", "process") else ""
    batch = f", batches of {stage.batch}" if stage.batch > 1 else ""
    knobs = "".join(f", {name}={value}" for name, value in stage.knobs)
    return f"{stage.workers} × {stage.size}{pool}{batch}{knobs}"

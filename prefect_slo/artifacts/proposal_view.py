"""A plan that waits for approval beside the one in force, in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from shlex import quote

from prefect_slo.artifacts.text import cell_text, dollars_text, seconds_text
from prefect_slo.plan import Plan, Prediction, StagePlan

_FIGURES: dict[str, Callable[[Prediction], str]] = {
    "latency at the percentile": lambda p: seconds_text(p.latency_at_percentile_s),
    "latency on average": lambda p: seconds_text(p.latency_s.mean),
    "cost on average": lambda p: dollars_text(p.cost_usd.mean),
}


def proposal_markdown(flow_name: str, before: Plan, after: Plan, *, name: str, reason: str, objection: str) -> str:
    """What would change, what that is predicted to do, and how it is approved or left alone.

    Args:
        flow_name: Name of the flow.
        before: The plan in force, with what is predicted of it now.
        after: The plan that is proposed.
        name: Names it, for whoever approves it.
        reason: Why it was made.
        objection: Why it was not adopted.
    """
    lines = [
        f"# A plan of {cell_text(flow_name)} waits for approval",
        "",
        f"**Its name**: `{name}`. To approve it by this name never takes another one that waits by then.",
        "",
        f"**Made because**: {reason}.",
        "",
        f"**Waits because** {objection}.",
        "",
        "| stage | in force | proposed |",
        "|---|---|---|",
    ]
    for stage in dict.fromkeys([*before.stages, *after.stages]):
        old, new = _words(before.stages.get(stage)), _words(after.stages.get(stage))
        lines.append(f"| {cell_text(stage)} | {old} | {'the same' if new == old else new} |")
    if before.predicted is not None and after.predicted is not None:
        asked = f" (asked: {after.objective})" if after.objective is not None else ""
        lines += ["", f"What the model predicts of both now{asked}:", ""]
        lines += ["| a run | in force | proposed |", "|---|--:|--:|"]
        lines += [f"| {what} | {told(before.predicted)} | {told(after.predicted)} |" for what, told in _FIGURES.items()]
    lines += [
        "",
        "Runs follow the plan in force until this one is approved. It is gone once another plan comes into force.",
        "",
        f"- In a shell: `prefect-slo approve {quote(flow_name)} {name}`",
        f"- Here: a custom run of the deployment `slo-replan/replan` with `flow_name` {cell_text(flow_name)}, "
        f"`proposal` {name} and `approve` switched on; later `roll_back` goes back.",
    ]
    return "\n".join(lines)


def settled_markdown(flow_name: str, became: str) -> str:
    """That no plan waits any more.

    Args:
        flow_name: Name of the flow.
        became: What became of the plan that did.
    """
    return f"# No plan of {cell_text(flow_name)} waits for approval\n\nThe last one {became}.\n"


def _words(stage: StagePlan | None) -> str:
    if stage is None:
        return "–"
    pool = f" on {cell_text(stage.pool)}" if stage.pool not in ("default", "process") else ""
    batch = f", batches of {stage.batch}" if stage.batch > 1 else ""
    knobs = "".join(f", {name}={value}" for name, value in stage.knobs)
    return f"{stage.workers} × {stage.size}{pool}{batch}{cell_text(knobs)}"

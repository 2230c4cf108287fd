"""``explain``: why a plan is what it is."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson, Cold, PlanFile, Source, read_plan
from prefect_slo.cli.output import print_json, print_line, print_table, working

if TYPE_CHECKING:
    from prefect_slo.objective import Slo
    from prefect_slo.planner.explain import Alternative, Explanation, StageReason


@app.command
def explain(source: Source, *, plan: PlanFile, cold: Cold = False, json: AsJson = False) -> None:
    """Where a plan's time and money go, what a second is worth, and each stage's best alternative."""
    from prefect_slo.artifacts.text import option_text, share_text
    from prefect_slo.planner.explain import explain as explained

    chosen = read_plan(plan)
    model = source.model()
    with working("Explaining"):
        told = explained(model, chosen, cold=cold)
    if json:
        passing = [{"source": e.source, "sink": e.sink, "method": e.method, "why": e.why} for e in chosen.passing]
        print_json({"workflow": chosen.workflow, **_document(told), **({"passing": passing} if passing else {})})
        return
    print_table(
        [
            {
                "stage": reason.criticality.stage,
                "chosen": option_text(reason.option),
                "on the longest path": share_text(reason.criticality.probability),
                "of its time": share_text(reason.criticality.path_share),
                "of the cost": share_text(reason.criticality.cost_share),
                "best alternative": _alternative(reason.best),
            }
            for reason in told.stages
        ],
        title=f"Why {plan}" + (f", made for {chosen.objective}" if chosen.objective else ""),
    )
    for line in _prices(told, chosen.objective):
        print_line(line)
    for reason in told.stages:
        print_line(f"{reason.criticality.stage}: {reason.why}.")
    for edge in chosen.passing:
        print_line(f"{edge.source} to {edge.sink}: {edge.why}.")


def _prices(told: Explanation, asked: Slo | None) -> list[str]:
    """What a hundredth more of each bound is worth, by the duals of the linear program."""
    from prefect_slo.artifacts.text import dollars_text, seconds_text

    lines = []
    if told.price_of_second is not None:
        step = 0.01 * (asked.latency.bound_s if asked and asked.latency else told.latency_s)
        saved = dollars_text(step * told.price_of_second)
        lines.append(f"A bound looser by 1 % ({seconds_text(step)}) would save about {saved} a run.")
    if told.seconds_per_dollar is not None and asked and asked.budget:
        step = 0.01 * asked.budget.bound_usd
        saved = seconds_text(step * told.seconds_per_dollar)
        lines.append(f"A budget larger by 1 % ({dollars_text(step)}) would save about {saved} a run.")
    return lines


def _alternative(other: Alternative | None) -> str:
    from prefect_slo.artifacts.text import dollars_text, option_text, seconds_text

    if other is None:
        return "–"
    cost, time = other.cost_change_usd, other.latency_change_s
    dearer, slower = "+" if cost > 0 else "−", "+" if time > 0 else "−"
    return f"{option_text(other.option)}: {dearer}{dollars_text(abs(cost))}, {slower}{seconds_text(abs(time))}"


def _document(told: Explanation) -> dict[str, Any]:
    return {
        "latency_s": told.latency_s,
        "cost_usd": told.cost_usd,
        "price_of_second_usd": told.price_of_second,
        "seconds_per_dollar": told.seconds_per_dollar,
        "stages": {reason.criticality.stage: _reason(reason) for reason in told.stages},
    }


def _reason(reason: StageReason) -> dict[str, Any]:
    return {
        "chosen": asdict(reason.option),
        "on_longest_path": reason.criticality.probability,
        "path_share": reason.criticality.path_share,
        "cost_share": reason.criticality.cost_share,
        "cheaper": None if reason.cheaper is None else asdict(reason.cheaper),
        "faster": None if reason.faster is None else asdict(reason.faster),
        "best": None if reason.best is None else asdict(reason.best),
        "why": reason.why,
    }

"""The plan as a table, Markdown and a Mermaid graph says everything and breaks on no name."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.artifacts import StageForecast, graph_mermaid, plan_markdown, plan_table
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.workflow import Stage, Workflow, chain


def test_the_table_has_a_row_per_stage_with_choices_and_forecasts(
    plan: Plan, forecasts: dict[str, StageForecast]
) -> None:
    rows = plan_table(plan, forecasts)
    assert [row["stage"] for row in rows] == list(plan.stages)
    assert rows[1] == {
        "stage": "train",
        "workers": 2,
        "each worker": "1 vCPU, 1024 MB",
        "record": "summary",
        "mean": "1.55 s",
        "p95": "1.71 s",
        "cost (mean)": "$0.0000300",
        "on the critical path": "93 %",
    }


def test_pool_batch_and_knobs_show_only_where_some_stage_has_them(plan: Plan) -> None:
    assert not {"pool", "batch", "knobs"} & set(plan_table(plan)[0])
    chosen = plan.with_stage("train", pool="gpu", batch=8, knobs=(("resolution", 480),))
    assert plan_table(chosen)[1] | {"pool": "gpu", "batch": 8, "knobs": "resolution=480"} == plan_table(chosen)[1]
    assert plan_table(chosen)[0]["pool"] == "default"


def test_the_markdown_tells_asked_predicted_and_both_claims_apart(
    plan: Plan, workflow: Workflow, forecasts: dict[str, StageForecast]
) -> None:
    text = plan_markdown(plan, workflow, forecasts)
    assert "**Asked**: at most 4 s in 95 % of runs." in text
    assert "latency 3.2 s on average, p95 3.72 s" in text
    assert "cost $0.0000641 on average" in text
    assert "under the model, with 99 % confidence (3.9 % of 100,000 fresh samples broke the bound; 5 % may)" in text
    assert (
        "On the samples of the search, no plan that leaves as much room to its bound is better by more than 0.4 %."
        in text
    )
    assert "no claim yet; 12 of the 90 runs that it takes." in text
    assert text.count("```") == 2


def test_an_uncertified_plan_says_so(plan: Plan, workflow: Workflow) -> None:
    assert "nothing; this plan was not checked" in plan_markdown(replace(plan, certificate=None), workflow)


def test_the_graph_has_every_stage_and_edge_and_marks_the_critical_path(
    plan: Plan, workflow: Workflow, forecasts: dict[str, StageForecast]
) -> None:
    lines = graph_mermaid(workflow, plan, forecasts).replace("\u00a0", " ").splitlines()
    assert lines[0] == "flowchart LR"
    assert '    s0["<b>pca</b><br/>1 × 2 vCPU<br/>420 ms, p95 470 ms"]:::critical' in lines
    assert "    s0 --> s1" in lines
    assert "    s1 ==>|item by item| s2" in lines
    assert "    s0 -->|30 %| s3" in lines
    assert sum(":::critical" in line for line in lines) == 3


def test_a_long_chain_is_drawn_from_the_top() -> None:
    assert graph_mermaid(Workflow("w", chain("a", "b", "c", "d"))).startswith("flowchart LR")
    assert graph_mermaid(Workflow("w", chain("a", "b", "c", "d", "e"))).startswith("flowchart TB")


@given(st.text(min_size=1, max_size=30).filter(str.strip))
def test_no_stage_name_can_break_out_of_its_label_or_cell(name: str) -> None:
    workflow = Workflow("w", (Stage(name),))
    node = graph_mermaid(workflow, Plan("w", None, {name: StagePlan()})).split("\n    ")[1]
    label = node.removeprefix('s0["<b>').removesuffix('"]:::stage')
    assert '"' not in label
    assert label.count("<") == label.count(">") == 2, "only the markup of the label itself"

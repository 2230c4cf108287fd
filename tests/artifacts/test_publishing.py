"""Artifacts reach a real Prefect server, and a server that is away never fails the flow."""

from __future__ import annotations

import json
import logging
import re
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.context import get_run_context
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from prefect_slo.artifacts import RunActual, StageForecast, publish_attainment, publish_plan, publishing
from prefect_slo.artifacts.publishing import key
from prefect_slo.attainment import Attainment
from prefect_slo.plan import Plan
from prefect_slo.workflow import Workflow

RUN = RunActual(3.41, 6.31e-5, {"pca": 0.43})


def _read(ids: tuple[UUID, ...]) -> list[dict[str, object]]:
    with get_client(sync_client=True) as client:
        return [client.request("GET", "/artifacts/{id}", path_params={"id": id_}).json() for id_ in ids]


def test_a_plan_and_its_run_become_versioned_artifacts_of_the_flow_run(
    prefect_server: str, plan: Plan, workflow: Workflow, forecasts: dict[str, StageForecast]
) -> None:
    @flow
    def publish() -> tuple[UUID, tuple[UUID, ...]]:
        run_id = get_run_context().flow_run.id  # type: ignore[union-attr]
        made = publish_plan("My Flow", plan, workflow=workflow, forecasts=forecasts, flow_run_id=run_id)
        told = publish_attainment("My Flow", plan, RUN, attainment=Attainment(1, 1), flow_run_id=run_id)
        return run_id, made + told

    run_id, ids = publish()
    table, graph, attainment = _read(ids)
    assert [a["key"] for a in (table, graph, attainment)] == [
        key("plan", "My Flow"), key("graph", "My Flow"), key("attainment", "My Flow"),
    ]  # fmt: skip
    assert [a["type"] for a in (table, graph, attainment)] == ["table", "markdown", "markdown"]
    assert {a["flow_run_id"] for a in (table, graph, attainment)} == {str(run_id)}
    assert [row["stage"] for row in json.loads(str(table["data"]))] == list(plan.stages)
    assert "```mermaid" in str(graph["data"])
    assert str(attainment["data"]).startswith("## Met: 3.41 s of 4 s")


async def test_publishing_works_from_inside_an_event_loop(prefect_server: str, plan: Plan) -> None:
    assert len(publish_attainment("async-flow", plan, RUN, attainment=Attainment(1, 1))) == 1


def test_a_server_that_is_away_is_logged_once(
    quick_retries: None, plan: Plan, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing._failures.clear()
    monkeypatch.setattr(logging.getLogger("prefect"), "propagate", True)
    away = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(away), caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert publish_attainment("f", plan, RUN, attainment=Attainment(1, 1)) == ()
    warnings = [record for record in caplog.records if "artifact was not published" in record.getMessage()]
    assert len(warnings) == 1
    assert sum(publishing._failures.values()) == 3


@pytest.mark.parametrize("name", ["ML pipeline", "--é--", "ml-pipeline", "a" * 300])
def test_keys_hold_only_what_the_api_takes(name: str) -> None:
    assert re.fullmatch(r"slo-plan(-[a-z0-9]+)+", key("plan", name))
    assert len(key("plan", name)) < 100


def test_flows_of_different_names_never_share_an_artifact() -> None:
    names = ["my-flow", "My Flow", "my_flow", "Übersicht", "übersicht", "集計", "検索", "!"]
    assert len({key("plan", name) for name in names}) == len(names)
    assert key("plan", "my-flow") == "slo-plan-my-flow"

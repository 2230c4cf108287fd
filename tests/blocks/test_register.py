from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from prefect_slo.blocks import MenuBlock, PriceListBlock, SLOProfile
from prefect_slo.pricing import price_list
from prefect_slo.telemetry.store import publish

ROOT = Path(__file__).parents[2]


def stored_documents() -> dict[str, dict[str, object]]:
    with get_client(sync_client=True) as client:
        documents = [
            *client.read_block_documents_by_type("slo-menu"),
            *client.read_block_documents_by_type("slo-price-list"),
        ]
    return {f"{d.block_type_name}/{d.name}": d.data for d in documents}


def test_registering_twice_stores_every_document_once(prefect_server):
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    command = [sys.executable, str(ROOT / "blocks" / "register.py")]
    first = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "slo-menu/local" in first.stdout
    before = stored_documents()
    runpy.run_path(command[1])["register"]()
    assert stored_documents() == before
    assert MenuBlock.load("local").menu.workers == (1, 2, 3, 4)
    assert PriceListBlock.load("aws-lambda-x86").prices == price_list("aws-lambda-x86")


@pytest.mark.parametrize("rebuild", [False, True])
def test_the_refit_flow_brings_profiles_up_to_date(prefect_server, make_run, tmp_path, monkeypatch, rebuild):
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path))
    name = f"refit {rebuild}"
    publish(name, [make_run(name, n, workers=n % 3 + 1) for n in range(6)])
    refit = runpy.run_path(str(ROOT / "flows" / "refit.py"))["refit"]
    for revision in (1, 2):
        assert refit(name, rebuild=rebuild) == {name: "no bound is known"}, "nobody has asked for one"
        assert SLOProfile.of_flow(name).revision == revision

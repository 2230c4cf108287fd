"""What the command line says of work pools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from prefect_slo.cli import main

TEMPLATE = {
    "variables": {"properties": {name: {"type": "string"} for name in ("image", "mem_limit")}, "required": []},
    "job_configuration": {"image": "{{ image }}", "mem_limit": "{{ mem_limit }}"},
}


@pytest.fixture(scope="module")
def pool(prefect_server: str) -> str:
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="cli-docker", type="docker", base_job_template=TEMPLATE))
    return "cli-docker"


def test_sizes_are_shown_in_the_units_of_the_pool(pool: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pools", "show", pool, "--vcpus", "2", "--memory-mb", "1024", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["sizes"]
    assert row == {"size": "2 vCPU / 2048 MB", "job_variables": {"mem_limit": "2048m"}}


def test_a_type_that_sizes_no_jobs_says_who_does(prefect_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="cli-process", type="process"))
    assert main(["pools", "show", "cli-process", "--gpu", "1"]) == 0
    shown = capsys.readouterr().out
    assert "1 vCPU / 2048 MB + 1 gpu" in shown
    assert "holds its worker to the size by itself" in shown


def test_a_gpu_takes_a_longer_template_which_is_written(
    pool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pools", "show", pool, "--gpu", "1"]) == 1
    assert f"prefect-slo pools extend {pool}" in capsys.readouterr().err
    assert main(["pools", "extend", pool, "-o", str(tmp_path / "template.json")]) == 0
    assert "prefect work-pool update" in capsys.readouterr().out
    template = json.loads((tmp_path / "template.json").read_text())
    assert template["job_configuration"]["container_create_kwargs"] == "{{ container_create_kwargs }}"
    assert template["job_configuration"]["image"] == "{{ image }}"


def test_a_pool_that_does_not_exist_is_named(prefect_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pools", "show", "nowhere"]) == 1
    assert "work pool 'nowhere' does not exist. Create it" in capsys.readouterr().err

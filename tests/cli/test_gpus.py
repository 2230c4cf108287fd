"""What the command line says of this machine's GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefect_slo.cli import main
from prefect_slo.placement import Device, Share
from prefect_slo.runner.local.gpu_ledger import GpuLedger


@pytest.fixture(autouse=True)
def own_books(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_devices_are_shown_with_what_is_held(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_GPU_DEVICES", "0:16384, 1:8192")
    GpuLedger((Device("0", 16384),)).claim(Share(0.25))
    assert main(["gpus", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["devices"]
    assert [(row["device"], row["cores_held"], row["memory_held_mb"]) for row in shown] == [
        ("0", 0.25, 4096),
        ("1", 0, 0),
    ]
    assert main(["gpus"]) == 0
    assert "Shares are" in capsys.readouterr().out


def test_a_machine_without_one_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_GPU_DEVICES", "none")
    assert main(["gpus"]) == 0
    assert "There is no GPU here" in capsys.readouterr().out

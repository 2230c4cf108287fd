from __future__ import annotations

from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_API_URL, PREFECT_HOME, temporary_settings
from pydantic import ValidationError

from prefect_slo.resources import Capacity
from prefect_slo.settings import SLOSettings

PREFIX = "PREFECT_INTEGRATIONS_SLO_"


def test_everything_is_on_and_unlimited_unless_said_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv(PREFIX + "HOME", raising=False)
    with temporary_settings({PREFECT_HOME: tmp_path}):
        settings = SLOSettings()
        assert settings.telemetry_directory.parent == tmp_path / "slo" / "telemetry"
    assert (settings.enabled, settings.telemetry, settings.mode) == (True, True, None)
    assert settings.capacity == Capacity()


def test_the_environment_is_read_when_settings_are_made(monkeypatch):
    for name, value in {
        "ENABLED": "false", "MODE": "enforce", "TELEMETRY": "0", "HOME": "~/slo", "CAPACITY_VCPUS": "1.5",
        "CAPACITY_MEMORY_MB": "2048", "CAPACITY_WORKERS": "3",
    }.items():  # fmt: skip
        monkeypatch.setenv(PREFIX + name, value)
    settings = SLOSettings()
    assert (settings.enabled, settings.mode, settings.telemetry) == (False, "enforce", False)
    assert settings.directory == Path.home() / "slo"
    assert settings.capacity == Capacity(1.5, 2048, 3)


@pytest.mark.parametrize(("name", "value"), [("MODE", "fast"), ("CAPACITY_VCPUS", "0"), ("ENABLED", "perhaps")])
def test_values_that_make_no_sense_are_refused_by_name(monkeypatch, name, value):
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(ValidationError, match=name.lower()):
        SLOSettings()


def test_prefect_toml_is_read(monkeypatch, tmp_path):
    (tmp_path / "prefect.toml").write_text('[integrations.slo]\nmode = "advise"\n')
    monkeypatch.chdir(tmp_path)
    assert SLOSettings().mode == "advise"


def test_every_api_has_a_folder_of_its_own_for_logs(tmp_path):
    def folder(url=None, database="slo.db"):
        connection = f"sqlite+aiosqlite:///{tmp_path}/{database}"
        with temporary_settings({PREFECT_API_URL: url, PREFECT_API_DATABASE_CONNECTION_URL: connection}):
            return SLOSettings().telemetry_directory

    workspaces = "https://api.prefect.cloud/api/accounts/a/workspaces"
    production, staging = folder(f"{workspaces}/production"), folder(f"{workspaces}/staging")
    assert production.name.startswith("api.prefect.cloud-")
    assert len({production, staging, folder()}) == 3
    assert production == folder(f"{workspaces}/production/", "another.db")
    assert folder() != folder(database="another.db"), "a server that comes and goes is its database"

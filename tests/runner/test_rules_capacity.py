"""Stages stay within what settings and machine allow, and name pools that exist."""

from __future__ import annotations

import pytest
from prefect import task

from prefect_slo.declaration import Declaration
from prefect_slo.errors import InvalidValue
from prefect_slo.loop.menus import MenuSettings, capacity_of, stage_menu
from prefect_slo.runner.recipe import Recipe
from prefect_slo.runner.rules import stage_rule


@task
def work() -> None: ...


def test_a_pool_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(InvalidValue, match=r"'gpu-farm'.*process"):
        stage_rule("work", work, Recipe(), Declaration(pool="gpu-farm"), processes=True)


def test_settings_narrow_what_plans_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_CAPACITY_VCPUS", "1")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_CAPACITY_MEMORY_MB", "2048")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_CAPACITY_WORKERS", "1")
    capacity = capacity_of()
    assert (capacity.vcpus, capacity.memory_mb, capacity.workers) == (1.0, 2048.0, 1)
    menu = stage_menu(MenuSettings())
    assert max(menu.workers) == 1
    assert {(size.vcpus, size.memory_mb) for size in menu.sizes} == {(1.0, 2048)}

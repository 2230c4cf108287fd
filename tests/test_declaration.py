"""What is declared of a task is checked when it is declared, not when its first run has ended."""

from __future__ import annotations

import pytest
from prefect import task

from prefect_slo import SLOTaskRunner, slo, slo_task
from prefect_slo.declaration import Declaration
from prefect_slo.errors import InvalidValue, SloError


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"menu": {"workers": (0,)}}, "menu.workers"),
        ({"menu": {"workers": ()}}, "menu.workers"),
        ({"menu": {"vcpus": (1, -2)}}, "menu.vcpus"),
        ({"menu": {"memory_mb": "much"}}, "menu.memory_mb"),
        ({"menu": {"batch": 1.5}}, "menu.batch"),
        ({"menu": {"colour": 1}}, "colour"),
        ({"menu": 3}, "menu"),
        ({"pins": {"workers": 0}}, "pins.workers"),
        ({"pins": {"vcpus": "two"}}, "pins.vcpus"),
        ({"pins": {"pool": ""}}, "pins.pool"),
        ({"pins": {"colour": 1}}, "colour"),
        ({"knobs": {"depth": ()}}, "menu.knobs.depth"),
        ({"knobs": {"depth": (object(),)}}, "menu.knobs.depth"),
        ({"knobs": {"workers": (1, 2)}}, "workers"),
        ({"pool": ""}, "pool"),
    ],
)
def test_values_that_cannot_be_are_refused_where_they_are_written(fields: dict[str, object], names: str) -> None:
    with pytest.raises(SloError, match=names):
        slo_task(**fields)(task(lambda x: x))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: slo_task(memroy_mb=512), "an argument of slo_task is 'memroy_mb'; expected one of idempotent"),
        (lambda: slo(latency="1s", stages={"a": {"memroy_mb": 1}}), r"an argument of stages\['a'\] is 'memroy_mb'"),
        (lambda: SLOTaskRunner(stages={"a": 3}), r"stages\['a'\] is 3; expected a mapping"),
    ],
)
def test_what_is_no_field_is_named_where_it_was_given(given, said: str) -> None:
    with pytest.raises(InvalidValue, match=said):
        given()


def test_values_are_taken_in_the_units_that_users_write() -> None:
    declared = Declaration(menu={"workers": 2, "memory_mb": ("2GB", 512)}, pins={"memory_mb": "1GB"})
    assert declared.menu == {"workers": (2,), "memory_mb": (2048, 512)}
    assert declared.pins == {"memory_mb": 1024}
    assert Declaration.of(declared) is declared

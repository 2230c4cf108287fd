"""Durations, money and memory as people write them."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo import units
from prefect_slo.errors import InvalidValue

ENDLESS = pytest.param("9" * 100_000 + "s", id="endless")
PAST_FLOATS = pytest.param(10**400, id="past-floats")


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (30, 30.0),
        (30.5, 30.5),
        ("30", 30.0),
        ("30s", 30.0),
        (" 250 ms ", 0.25),
        ("1m30s", 90.0),
        ("1h 5min", 3900.0),
        ("2d", 172800.0),
        ("1e3s", 1000.0),
        (timedelta(minutes=2), 120.0),
        (np.float32(2.5), 2.5),
        (np.int64(3), 3.0),
    ],
)
def test_a_duration_is_read_as_people_write_it(written: object, seconds: float) -> None:
    assert units.seconds(written) == pytest.approx(seconds)  # type: ignore[arg-type]


@pytest.mark.parametrize(("written", "usd"), [(0.02, 0.02), ("$0.02", 0.02), (" $ 1.5 ", 1.5), ("0.5 USD", 0.5)])
def test_an_amount_is_read_as_people_write_it(written: object, usd: float) -> None:
    assert units.dollars(written) == usd  # type: ignore[arg-type]


@pytest.mark.parametrize(("written", "mb"), [(512, 512), ("512MB", 512), ("2GB", 2048), ("0.5 gib", 512), (1.2, 2)])
def test_memory_is_read_as_people_write_it_and_never_rounded_down(written: object, mb: int) -> None:
    assert units.megabytes(written) == mb  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "written",
    ["", "  ", "soon", "30x", "s30", "30s later", "-5s", "0s", "nan", "inf", "1e400s", ENDLESS,
     0, -1, float("nan"), float("inf"), PAST_FLOATS, True, None, [30], {"s": 30}, b"30s", timedelta(0), 3 + 0j],
)  # fmt: skip
def test_what_is_no_duration_is_refused_with_its_field_and_value(written: object) -> None:
    with pytest.raises(InvalidValue) as refused:
        units.seconds(written, field="bound")  # type: ignore[arg-type]
    assert refused.value.field == "bound"
    assert "bound is " in str(refused.value)


@pytest.mark.parametrize("written", ["", "free", "$", "-$2", "$-2", "0", "nan", True, None, 0.0])
def test_what_is_no_amount_is_refused(written: object) -> None:
    with pytest.raises(InvalidValue, match="budget_usd"):
        units.dollars(written)  # type: ignore[arg-type]


def test_a_percent_where_a_fraction_belongs_gets_a_hint() -> None:
    with pytest.raises(InvalidValue, match=r"did you mean 0\.95\?"):
        units.fraction(95, "percentile")


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.0, 100, "0.95", None, False, float("nan")])
def test_a_fraction_lies_strictly_between_0_and_1(value: object) -> None:
    with pytest.raises(InvalidValue, match="percentile"):
        units.fraction(value, "percentile")


@pytest.mark.parametrize("value", ["8", 2.5, 0, -3, True, None, float("inf"), PAST_FLOATS, [8]])
def test_a_count_is_a_whole_number_of_at_least_one(value: object) -> None:
    with pytest.raises(InvalidValue, match="workers"):
        units.whole(value, "workers")


@given(st.integers(1, 2**62))
def test_a_count_keeps_every_digit(value: int) -> None:
    assert units.whole(value, "seed") == value
    assert type(units.whole(np.int64(value), "seed")) is int


@given(st.floats(1e-3, 1e6))
def test_seconds_and_milliseconds_agree(value: float) -> None:
    assert units.seconds(f"{value!r}s") == pytest.approx(units.seconds(f"{1000 * value!r}ms"))


@pytest.mark.parametrize("value", ["8", b"8", {"a": 1}, 8, None, np.array(8)])
def test_a_list_is_not_a_text_a_table_or_a_number(value: object) -> None:
    with pytest.raises(InvalidValue, match="a list"):
        units.items(value, "workers")


def test_a_list_of_one_kind_refuses_another() -> None:
    assert units.instances(int, [1, 2], "counts") == (1, 2)
    with pytest.raises(InvalidValue, match="counts is 'a'"):
        units.instances(int, [1, "a"], "counts")

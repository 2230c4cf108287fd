"""Price lists."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

import pytest

from prefect_slo.errors import InvalidValue, SloError, UnknownPrices
from prefect_slo.pricing import PRICES, PriceList, price_list

SHIPPED = sorted(path.stem for path in PRICES.glob("*.toml"))

ENDLESS = pytest.param("x" * 5000, id="endless")
NUL = pytest.param("nul\0", id="nul")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_list_says_its_day_region_and_source(name: str) -> None:
    prices = price_list(name)
    assert prices.name == name
    assert date.fromisoformat(prices.as_of)
    assert prices.region
    assert prices.source.startswith("https://")


def test_lambda_bills_memory_alone() -> None:
    """1,792 MB for one second on x86 in us-east-1: 1.75 GB at $0.0000166667."""
    x86 = price_list("aws-lambda-x86")
    assert x86.rate(1792 / 1769, 1792) == pytest.approx(1.75 * 1.66667e-5)
    assert x86.mb_per_vcpu == 1769


def test_an_hour_of_the_local_list_costs_what_the_container_service_publishes() -> None:
    assert 3600 * price_list("local").rate(vcpus=1, memory_mb=2048) == pytest.approx(0.04048 + 2 * 0.004445, rel=1e-3)


def test_hardware_may_have_prices_of_its_own() -> None:
    prices = PriceList("p", vcpu_second=1.0, gpu_second=10.0, hardware={"gpu": {"vcpu_second": 2.0}})
    assert prices.rate(1, 1024) == 1.0
    assert prices.rate(1, 1024, gpu=0.5, hardware="gpu") == 2.0 + 5.0


def test_a_users_file_is_read_and_read_again_once_changed(tmp_path: Path) -> None:
    path = tmp_path / "ours.toml"
    path.write_text('name = "ours"\nvcpu_second = 1.0\nas_of = 2026-11-01\n')
    assert price_list(str(path)).vcpu_second == 1.0
    assert price_list(str(path)).as_of == "2026-11-01"
    path.write_text('name = "ours"\nvcpu_second = 2.0\n')
    os.utime(path, ns=(1, 1))
    assert price_list(str(path)).vcpu_second == 2.0


@pytest.mark.parametrize(
    "name",
    [
        "moon",
        "",
        "missing.toml",
        pytest.param("x" * 5000, id="endless"),
        pytest.param("nul\0", id="nul"),
        None,
        3,
        ["local"],
        "/",
    ],
)
def test_an_unknown_list_is_refused_with_those_that_exist(name: object) -> None:
    with pytest.raises(UnknownPrices, match="aws-lambda-x86, local"):
        price_list(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("vcpu_second = 1.0", "prices.name"),
        ('name = "ours"\nvcpu_secnod = 1.0', "prices.vcpu_secnod"),
        ('name = "ours"\nvcpu_second = -1', "prices.ours.vcpu_second"),
        ('name = "ours"\ngb_second = nan', "prices.ours.gb_second"),
        ('name = "ours"\nrequest = "free"', "prices.ours.request"),
        ('name = "ours"\nrequest = true', "prices.ours.request"),
        ('name = "ours"\nmb_per_vcpu = 0', "prices.ours.mb_per_vcpu"),
        ('name = "ours"\nregion = 3', "prices.ours.region"),
        ("name = 3", "prices.name"),
        ('name = "ours"\nhardware = 3', "prices.ours.hardware"),
        ('name = "ours"\nhardware = {gpu = 3}', "prices.ours.hardware.gpu"),
        ('name = "ours"\nhardware = {gpu = {vcpu_second = inf}}', "prices.ours.hardware.gpu.vcpu_second"),
        ('name = "ours"\nhardware = {gpu = {second = 1}}', "prices.ours.hardware.gpu.second"),
        ("name = ", "menu.prices"),
    ],
)
def test_a_file_that_holds_no_prices_is_refused_by_field(tmp_path: Path, content: str, field: str) -> None:
    path = tmp_path / "ours.toml"
    path.write_text(content)
    with pytest.raises(InvalidValue) as refused:
        price_list(str(path))
    assert refused.value.field == field


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ours.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SloError, match=r"ours\.toml"):
        price_list(str(path))

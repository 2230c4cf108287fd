"""Price lists."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from prefect_slo.errors import InvalidValue, SloError, UnknownPrices
from prefect_slo.pricing import OWN, PRICES, PriceList, look_first_in, price_list

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


def test_a_call_is_billed_for_a_least_time_and_in_steps() -> None:
    fargate, x86 = price_list("aws-fargate-x86"), price_list("aws-lambda-x86")
    assert [fargate.billed_s(t) for t in (1.0, 60.0, 60.2)] == [60.0, 60.0, 61.0]
    assert x86.billed_s(0.0123) == pytest.approx(0.013)
    assert price_list("local").billed_s(0.0123) == 0.0123
    assert [price_list(name).bills for name in ("local", "aws-lambda-x86", "aws-fargate-x86")] == [
        "leases", "calls", "calls",
    ]  # fmt: skip


def test_a_month_of_billions_of_gb_seconds_is_cheaper() -> None:
    x86 = price_list("aws-lambda-x86")
    assert [x86.after(used).gb_second for used in (0, 6e9, 20e9)] == [0.0000166667, 0.000015, 0.0000133334]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_list_says_how_sure_it_is(name: str) -> None:
    assert price_list(name).confidence in ("high", "medium", "low")


def test_a_spot_list_costs_its_share_of_the_one_on_demand() -> None:
    for kind, share in (("cpu", 0.45), ("gpu", 0.5)):
        demand, spot = price_list(f"aws-ec2-{kind}"), price_list(f"aws-ec2-{kind}-spot")
        assert spot.confidence == "low"
        for hardware in spot.hardware:
            paid = [each.rate(2, 4096, float(kind == "gpu"), hardware) for each in (demand, spot)]
            assert paid[1] == pytest.approx(share * paid[0], rel=1e-4)


def test_a_folder_of_ones_own_goes_before_the_package(tmp_path: Path) -> None:
    (tmp_path / "aws-lambda-x86.toml").write_text('name = "aws-lambda-x86"\ngb_second = 0.00001\nrequest = 0.0000001\n')
    look_first_in(tmp_path)
    try:
        assert price_list("aws-lambda-x86").gb_second == 0.00001
        assert price_list("local").vcpu_second > 0
    finally:
        look_first_in(None)
    assert price_list("aws-lambda-x86").gb_second == 0.0000166667


def test_the_folder_is_named_by_a_variable(tmp_path: Path) -> None:
    (tmp_path / "aws-lambda-x86.toml").write_text('name = "aws-lambda-x86"\ngb_second = 0.25\n')
    code = "from prefect_slo.pricing import price_list; print(price_list('aws-lambda-x86').gb_second)"
    told = subprocess.run([sys.executable, "-c", code], env={**os.environ, OWN: str(tmp_path)}, capture_output=True)
    assert told.stdout.decode().strip() == "0.25", told.stderr.decode()


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ('name = "ours"\nbills = "often"', "prices.ours.bills"),
        ('name = "ours"\nconfidence = "very"', "prices.ours.confidence"),
        ('name = "ours"\ntiers = [[1, 2, 3]]', "prices.ours.tiers"),
        ('name = "ours"\ntiers = [[2e9, 1.0], [1e9, 2.0]]', "prices.ours.tiers"),
        ('name = "ours"\nminimum_s = -1', "prices.ours.minimum_s"),
    ],
)
def test_how_time_is_billed_is_checked(tmp_path: Path, content: str, field: str) -> None:
    (tmp_path / "ours.toml").write_text(content)
    with pytest.raises(InvalidValue) as refused:
        price_list(str(tmp_path / "ours.toml"))
    assert refused.value.field == field

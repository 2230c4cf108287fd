"""Prices read from the Pricing API, in the form that it answers in; the service itself is not asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import ANY, Stubber

from prefect_slo import pricing
from prefect_slo.aws import refresh
from prefect_slo.aws.refresh import EC2, refreshed
from prefect_slo.charges import charge
from prefect_slo.cli import main
from prefect_slo.errors import InvalidValue
from prefect_slo.pricing import price_list
from prefect_slo.testing.aws import fake_credentials, no_real_aws

DAY = date(2026, 11, 27)


def product(prices: dict[str, str], unit: str = "Second", **attributes: str) -> str:
    """A product as the API tells it: attributes, and price dimensions by the amount that they begin at."""
    dimensions = {
        f"SKU.JRTCKXETXF.{k}": {
            "unit": unit, "beginRange": begin, "endRange": "Inf", "description": "", "appliesTo": [],
            "rateCode": f"SKU.JRTCKXETXF.{k}", "pricePerUnit": {"USD": usd},
        }
        for k, (begin, usd) in enumerate(prices.items())
    }  # fmt: skip
    term = {"SKU.JRTCKXETXF": {"priceDimensions": dimensions, "sku": "SKU", "offerTermCode": "JRTCKXETXF"}}
    return json.dumps({"product": {"attributes": attributes, "sku": "SKU"}, "terms": {"OnDemand": term}})


LAMBDA = [
    product({"0": "0.0000180000", "6000000000": "0.0000160000", "15000000000": "0.0000140000"},
            "Lambda-GB-Second", group="AWS-Lambda-Duration", usagetype="EUC1-Lambda-GB-Second"),
    product({"0": "0.0000140000"}, "Lambda-GB-Second", group="AWS-Lambda-Duration-ARM"),
    product({"0": "0.0000002400"}, "Requests", group="AWS-Lambda-Requests"),
    product({"0": "0.0000000370"}, "Lambda-GB-Second", group="AWS-Lambda-Storage-Duration"),
]  # fmt: skip
FARGATE = [
    product({"0": "0.0465600000"}, "hours", usagetype="EUC1-Fargate-vCPU-Hours:perCPU"),
    product({"0": "0.0051100000"}, "hours", usagetype="EUC1-Fargate-GB-Hours"),
    product({"0": "0.0372500000"}, "hours", usagetype="EUC1-Fargate-ARM-vCPU-Hours:perCPU"),
    product({"0": "0.0041000000"}, "hours", usagetype="EUC1-Fargate-ARM-GB-Hours"),
]
S3 = [
    product({"0": "0.0000054000"}, "Requests", group="S3-API-Tier1"),
    product({"0": "0.0000004300"}, "Requests", group="S3-API-Tier2"),
]


@pytest.fixture
def api() -> Any:
    with fake_credentials(), no_real_aws():
        client = boto3.client("pricing", region_name="us-east-1")
        with Stubber(client) as stubber:
            yield client, stubber
            stubber.assert_no_pending_responses()


@pytest.fixture
def answers(api: Any) -> Callable[..., Any]:
    """A client that answers for Lambda (in two pages), Fargate, S3, and instances where they are asked for."""

    def build(*, instances: bool = False) -> Any:
        client, stubber = api
        asked = {"ServiceCode": ANY, "Filters": ANY, "FormatVersion": "aws_v1"}
        stubber.add_response("get_products", {"PriceList": LAMBDA[:2], "NextToken": "more"}, asked)
        stubber.add_response("get_products", {"PriceList": LAMBDA[2:]}, {**asked, "NextToken": "more"})
        for products in (FARGATE, S3):
            stubber.add_response("get_products", {"PriceList": products}, asked)
        for types in EC2.values() if instances else ():
            for instance in types.values():
                found = (
                    [] if instance == "p5.4xlarge" else [product({"0": "3.6"}, "Hrs", instanceType=instance, vcpu="4")]
                )
                stubber.add_response("get_products", {"PriceList": found}, asked)
        return client

    return build


def test_lambda_is_read_with_its_tiers_requests_and_disk(answers: Callable[..., Any]) -> None:
    found = refreshed("eu-central-1", DAY, client=answers(), instances=False)
    x86, arm = found.lists["aws-lambda-x86"], found.lists["aws-lambda-arm"]
    assert (x86.gb_second, x86.request, x86.storage_gb_second) == (0.000018, 0.00000024, 0.000000037)
    assert x86.tiers == ((6e9, 0.000016), (15e9, 0.000014))
    assert (x86.region, x86.as_of, x86.confidence) == ("eu-central-1", "2026-11-27", "high")
    assert x86.mb_per_vcpu == 1769
    assert (arm.gb_second, arm.request) == (0.000014, price_list("aws-lambda-arm").request)


def test_fargate_is_read_by_the_hour_and_s3_by_the_request(answers: Callable[..., Any]) -> None:
    found = refreshed("eu-central-1", DAY, client=answers(), instances=False)
    assert 3600 * found.lists["aws-fargate-x86"].rate(1, 2048) == pytest.approx(0.04656 + 2 * 0.00511, rel=1e-6)
    assert found.lists["aws-fargate-arm"].minimum_s == 60
    assert found.charges == {"s3.put": 0.0000054, "s3.get": 0.00000043}


def test_instances_are_read_one_by_one_and_what_is_not_told_stays(answers: Callable[..., Any]) -> None:
    found = refreshed("eu-central-1", DAY, client=answers(instances=True))
    gpu, cpu = found.lists["aws-ec2-gpu"], found.lists["aws-ec2-cpu"]
    assert gpu.rate(4, 16_384, 1.0, "l4") == pytest.approx(0.001)
    assert gpu.hardware["h100"] == price_list("aws-ec2-gpu").hardware["h100"]
    assert cpu.rate(1, 2048, hardware="c7i") == pytest.approx(0.001 / 4)


def test_every_instance_type_stands_for_hardware_of_its_list() -> None:
    for name, types in EC2.items():
        assert set(types) == set(price_list(name).hardware)


@pytest.mark.parametrize(
    ("pages", "field"), [([[], [], []], "region"), ([["{"], [], []], "prices"), ([['{"terms": {}}'], [], []], "prices")]
)
def test_an_answer_that_says_nothing_is_refused(api: Any, pages: list[list[str]], field: str) -> None:
    client, stubber = api
    for products in pages if field == "region" else pages[:1]:
        stubber.add_response("get_products", {"PriceList": products})
    with pytest.raises(InvalidValue) as refused:
        refreshed("mars-north-1", DAY, client=client)
    assert refused.value.field == field


def test_the_command_writes_lists_that_go_before_the_shipped_ones(
    answers: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = answers()
    monkeypatch.setattr(refresh, "aws_client", lambda *_, **__: client)
    monkeypatch.setattr(pricing, "_OWN_FOLDERS", [tmp_path])
    assert main(["aws", "prices", "--region", "eu-central-1", "--no-instances", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["list"] for row in told["lists"]} >= {"aws-lambda-x86", "aws-fargate-arm"}
    assert price_list("aws-lambda-x86").gb_second == 0.000018
    assert price_list("aws-lambda-x86").tiers == ((6e9, 0.000016), (15e9, 0.000014))
    assert charge("s3.put").value == 0.0000054
    assert charge("s3.put").region == "eu-central-1"
    assert charge("step_functions.transition").value == 0.000025

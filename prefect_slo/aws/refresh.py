"""Price lists read anew from AWS's Pricing API, for a region; what it doesn't say stays as it was shipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from prefect_slo.aws.clients import client as aws_client
from prefect_slo.errors import InvalidValue
from prefect_slo.pricing import PriceList, price_list

API_REGION = "us-east-1"
"""Prices of all regions are told in a few of them."""

SOURCE = "https://api.pricing.us-east-1.amazonaws.com/"
EC2 = {
    "aws-ec2-cpu": {
        "c5": "c5.large", "c6i": "c6i.large", "c7i": "c7i.large", "c7g": "c7g.large", "m5": "m5.large",
        "m6i": "m6i.large", "c8i": "c8i.xlarge",
    },
    "aws-ec2-gpu": {
        "t4": "g4dn.xlarge", "a10g": "g5.xlarge", "l4": "g6.xlarge", "l40s": "g6e.xlarge", "h100": "p5.4xlarge",
        "l4-3gb": "g6f.large",
    },
}  # fmt: skip
"""Instance types whose prices stand for hardware of the lists."""

_READ_S = 60.0


@dataclass(frozen=True)
class Refreshed:
    """What the API says.

    Attributes:
        lists: Price lists by name.
        charges: Of services beside time, by name: US dollars.
    """

    lists: Mapping[str, PriceList]
    charges: Mapping[str, float]


def refreshed(region: str, day: date, *, client: Any = None, instances: bool = True) -> Refreshed:
    """Prices of a region as AWS tells them today.

    Args:
        region: E.g. ``eu-central-1``.
        day: Today.
        client: boto3's client of the Pricing API; made where there is none.
        instances: Whether to ask for EC2 instances, a request for each type.

    Raises:
        InvalidValue: A region that AWS has no prices for, or an answer that can't be read.
    """
    api = client or aws_client("pricing", region=API_REGION, endpoint=None, read_s=_READ_S, connections=4, attempts=5)
    known = {"region": region, "as_of": day.isoformat(), "source": SOURCE, "confidence": "high"}
    lambdas, fargate, s3 = (list(_products(api, service, region)) for service in ("AWSLambda", "AmazonECS", "AmazonS3"))
    if not lambdas:
        raise InvalidValue("region", region, "a region that AWS tells prices of, such as eu-central-1")
    lists = {
        **_lambda_lists(lambdas, known),
        **_fargate_lists(fargate, known),
        **(_instance_lists(api, region, known) if instances else {}),
    }
    charges = {
        name: price
        for name, group in (("s3.put", "S3-API-Tier1"), ("s3.get", "S3-API-Tier2"))
        if (price := next((t[0][1] for a, t in s3 if a.get("group") == group), None)) is not None
    }
    return Refreshed(lists, charges)


def charges_toml(found: Refreshed, region: str, day: date) -> str:
    """The file ``services/aws.toml`` that says these charges."""
    lines = [
        f'as_of = "{day.isoformat()}"', f"region = {json.dumps(region)}", f'source = "{SOURCE}"', 'confidence = "high"',
    ]  # fmt: skip
    for name, value in found.charges.items():
        lines += ["", f"[{name}]", f"value = {value!r}", 'unit = "USD per request"']
    return "\n".join(lines) + "\n"


def _lambda_lists(products: list[_Product], known: Mapping[str, Any]) -> dict[str, PriceList]:
    lists = {}
    for name, suffix in (("aws-lambda-x86", ""), ("aws-lambda-arm", "-ARM")):
        tiers = _tiers_of(products, f"AWS-Lambda-Duration{suffix}")
        if not tiers:
            continue
        changes: dict[str, Any] = {"gb_second": tiers[0][1], "tiers": tuple(tiers[1:]), **known}
        if requests := _tiers_of(products, f"AWS-Lambda-Requests{suffix}"):
            changes["request"] = requests[0][1]
        if disk := _tiers_of(products, f"AWS-Lambda-Storage-Duration{suffix}"):
            changes["storage_gb_second"] = disk[0][1]
        lists[name] = replace(price_list(name), **changes)
    return lists


def _fargate_lists(products: list[_Product], known: Mapping[str, Any]) -> dict[str, PriceList]:
    hours = {str(a.get("usagetype", "")).rpartition("Fargate-")[2]: tiers[0][1] for a, tiers in products if tiers}
    lists = {}
    for name, prefix in (("aws-fargate-x86", ""), ("aws-fargate-arm", "ARM-")):
        vcpu, memory = hours.get(f"{prefix}vCPU-Hours:perCPU"), hours.get(f"{prefix}GB-Hours")
        if vcpu is not None and memory is not None:
            rates = replace(price_list(name), vcpu_second=_by_second(vcpu), gb_second=_by_second(memory))
            lists[name] = replace(rates, **known)
    return lists


def _instance_lists(api: Any, region: str, known: Mapping[str, Any]) -> dict[str, PriceList]:
    lists = {}
    for name, types in EC2.items():
        shipped = price_list(name)
        hardware = {kind: dict(rates) for kind, rates in shipped.hardware.items()}
        for kind, instance in types.items():
            found = list(_products(api, "AmazonEC2", region, **_LINUX, instanceType=instance))
            priced = [(attributes, tiers[0][1]) for attributes, tiers in found if tiers and tiers[0][1] > 0]
            if not priced:
                continue
            attributes, hour = priced[0]
            if "gpu_second" in hardware.get(kind, {}):
                hardware[kind]["gpu_second"] = _by_second(hour)
            else:
                hardware[kind] = {"vcpu_second": _by_second(hour / float(attributes["vcpu"]))}
        lists[name] = replace(shipped, hardware=hardware, **known)
    return lists


_LINUX = {"operatingSystem": "Linux", "tenancy": "Shared", "preInstalledSw": "NA", "capacitystatus": "Used"}
_Product = tuple[Mapping[str, Any], list[tuple[float, float]]]


def _products(api: Any, service: str, region: str, **attributes: str) -> Iterator[_Product]:
    """Attributes of products, and their on-demand prices as ``(from that amount on, US dollars)``, ascending."""
    wanted = {"regionCode": region, **attributes}
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    token: dict[str, str] = {}
    while True:
        page = api.get_products(ServiceCode=service, Filters=filters, FormatVersion="aws_v1", **token)
        for document in page["PriceList"]:
            yield _product(document)
        if not page.get("NextToken"):
            return
        token = {"NextToken": page["NextToken"]}


def _product(document: str) -> _Product:
    try:
        entry = json.loads(document)
        dimensions = [
            dimension
            for term in entry.get("terms", {}).get("OnDemand", {}).values()
            for dimension in term["priceDimensions"].values()
        ]
        tiers = [(float(d.get("beginRange", 0)), float(d["pricePerUnit"]["USD"])) for d in dimensions]
        return entry["product"]["attributes"], sorted(tiers)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"a product of the Pricing API ({type(error).__name__}: {error})"
        raise InvalidValue("prices", document[:200], reason) from None


def _tiers_of(products: list[_Product], group: str) -> list[tuple[float, float]]:
    """The prices of the first product of a group."""
    return next((tiers for attributes, tiers in products if attributes.get("group") == group and tiers), [])


def _by_second(hour_usd: float) -> float:
    """A price per second, written in twelve digits after the point."""
    return round(hour_usd / 3600, 12)

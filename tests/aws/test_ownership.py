"""What a pool removes is what it has made: names that look alike, and things of other pools, stay."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import boto3
import pytest

from prefect_slo import BatchJobs, BatchPool, BatchQueue, LambdaPool
from prefect_slo.aws.ownership import POOL_TAG, Owner
from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.testing.aws import LocalAws

REGION = "us-east-1"


@pytest.fixture(autouse=True)
def empty(account: LocalAws) -> Iterator[None]:
    """The account is left as it was found."""
    yield
    for name in functions():
        boto3.client("lambda").delete_function(FunctionName=name)
    for found in boto3.client("batch").describe_job_definitions(status="ACTIVE")["jobDefinitions"]:
        boto3.client("batch").deregister_job_definition(jobDefinition=found["jobDefinitionArn"])
    bucket = S3Prefix.of(account.bucket).bucket
    for key in keys(bucket):
        boto3.client("s3").delete_object(Bucket=bucket, Key=key)
    with suppress(boto3.client("s3").exceptions.ClientError):
        boto3.client("s3").delete_bucket_lifecycle(Bucket=bucket)


def functions() -> set[str]:
    return {found["FunctionName"] for found in boto3.client("lambda").list_functions()["Functions"]}


def definitions() -> set[str]:
    found = boto3.client("batch").describe_job_definitions(status="ACTIVE")["jobDefinitions"]
    return {each["jobDefinitionName"] for each in found}


def keys(bucket: str) -> set[str]:
    return {found["Key"] for found in boto3.client("s3").list_objects_v2(Bucket=bucket).get("Contents", ())}


def rules(bucket: str) -> set[str]:
    client = boto3.client("s3")
    try:
        return {rule["Filter"]["Prefix"] for rule in client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]}
    except client.exceptions.ClientError:
        return set()


@pytest.mark.parametrize("inner", ["etl/big", "etl/", "etl//x", "../etl"])
def test_the_folder_of_a_pool_lies_in_that_of_no_other(inner: str) -> None:
    outer, within = (S3Prefix("b").under(str(Owner("p", pool))).prefix for pool in ("etl", inner))
    assert outer == "prefect-slo/p/etl"
    assert within != outer
    assert not within.startswith(f"{outer}/")
    assert within.count("/") == 2


ALIKE = [
    ({"prefix": "etl"}, {"prefix": "etl-prod"}),
    ({"prefix": "etl"}, {"prefix": "etl-0123456789"}),
    ({"name": "etl"}, {"name": "etl-prod"}),
    ({"name": "etl"}, {"name": "etl", "prefix": "prod"}),
    ({"name": "etl"}, {"name": "prod", "timeout_s": 31}),
]


@pytest.mark.parametrize(("mine", "theirs"), ALIKE)
def test_one_pool_leaves_all_that_another_has_made(
    account: LocalAws, mine: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """Functions, job definitions, objects and the bucket's rule, of two pools with one bucket and one queue."""
    queue = account.batch.queue(f"queue-{ALIKE.index((mine, theirs))}")

    def pool(settings: dict[str, Any]) -> LambdaPool:
        jobs = BatchJobs(queue, "image", prefix=settings.get("prefix", "prefect-slo"), region=REGION)
        made = account.pool(memory_mb=(128, 256), batch=jobs, **settings)
        made._store.put(made._store.key("runs", "one", "1"), b"x")
        return made

    one, other = pool(mine), pool(theirs)
    bucket = one.bucket.bucket
    own = {other.functions.name(mb) for mb in (128, 256)}
    assert {row.name: row.state for row in one.status()}.keys().isdisjoint(own), "nor does it show them"
    gone = one.destroy()
    assert sorted(gone) == sorted([*(one.functions.name(mb) for mb in (128, 256)), one.batch.definition])
    assert functions() == own
    assert definitions() == {other.batch.definition}
    assert keys(bucket) == {other._store.key("runs", "one", "1")}
    assert rules(bucket) == {f"{other._store.prefix}/"}
    assert {row.state for row in other.status()} == {"deployed"}
    other.destroy()
    assert (functions(), definitions(), keys(bucket), rules(bucket)) == (set(), set(), set(), set())


def test_old_versions_are_those_of_the_pool_itself(account: LocalAws) -> None:
    before, other = account.pool(memory_mb=(128,), timeout_s=20), account.pool(memory_mb=(128,), name="other")
    now = account.pool(memory_mb=(128,), timeout_s=25)
    assert now.destroy(only_old=True) == [before.functions.name(128)]
    assert functions() == {now.functions.name(128), other.functions.name(128)}


def test_a_function_that_only_looks_like_one_of_the_pools_stays(account: LocalAws) -> None:
    pool, package = account.pool(memory_mb=(128,), prefix="etl"), io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("main.py", "")
    for name, tags in (("etl-0123456789-128", {}), ("etl-0123456789-256", {POOL_TAG: "etl/somebody"})):
        boto3.client("lambda").create_function(
            FunctionName=name, Runtime="python3.11", Role=account.role, Handler="main.handler",
            Code={"ZipFile": package.getvalue()}, Tags=tags,
        )  # fmt: skip
    assert pool.destroy() == [pool.functions.name(128)]
    assert functions() == {"etl-0123456789-128", "etl-0123456789-256"}


def test_what_else_lies_in_the_bucket_stays_whatever_prefix_it_is_given(account: LocalAws) -> None:
    """A prefix that holds a user's own files: they are neither deleted nor made to expire."""
    pool = account.pool(memory_mb=(128,), bucket=f"{account.bucket.removesuffix('/prefect-slo')}/films")
    bucket = pool.bucket.bucket
    boto3.client("s3").put_object(Bucket=bucket, Key="films/one.mp4", Body=b"film")
    other = {"ID": "theirs", "Filter": {"Prefix": "logs/"}, "Status": "Enabled", "Expiration": {"Days": 90}}
    S3Prefix(bucket, region=REGION)._put_rules([*S3Prefix(bucket, region=REGION)._rules(), other])
    assert rules(bucket) == {"films/prefect-slo/lambda/", "logs/"}
    pool.destroy()
    assert keys(bucket) == {"films/one.mp4"}
    assert rules(bucket) == {"logs/"}


def test_a_queue_is_removed_by_the_pool_that_made_it_and_no_other(account: LocalAws) -> None:
    ec2 = boto3.client("ec2", region_name=REGION)
    subnet = ec2.describe_subnets()["Subnets"][0]
    group = ec2.describe_security_groups(Filters=[{"Name": "vpc-id", "Values": [subnet["VpcId"]]}])["SecurityGroups"][0]
    queue = BatchQueue(
        "shared", subnets=(subnet["SubnetId"],), security_groups=(group["GroupId"],), service_role=account.role,
        region=REGION,
    )  # fmt: skip
    jobs = BatchJobs(queue, "image", memory_mb=2048, execution_role=account.role, region=REGION)
    one, other = (BatchPool(jobs, account.bucket, name=name) for name in ("one", "other"))
    for pool in (one, other):
        pool.deploy()
    assert other.destroy() == [other.jobs.definition]
    assert [row.state for row in one.status()] == ["deployed", "deployed"]
    assert one.destroy() == [one.jobs.definition, "shared"]
    by_hand = replace(queue, name=account.batch.queue("by-hand"))
    pool = BatchPool(replace(jobs, queue=by_hand), account.bucket)
    assert pool.destroy() == []
    assert [found["state"] for found in boto3.client("batch").describe_job_queues(jobQueues=["by-hand"])["jobQueues"]]


def test_names_and_tags_say_whose_something_is() -> None:
    owner = Owner("etl", "lambda")
    assert owner.tags("v")[POOL_TAG] == "etl/lambda"
    assert owner.made(owner.tags("another"))
    assert not owner.made(None)
    assert not owner.made(Owner("etl", "other").tags("v"))
    assert owner.version_in("etl-0123456789-128", r"-\d+") == "0123456789"
    for name in ("etl-prod-0123456789-128", "etl-012345678-128", "etl-0123456789-128-1", "x-etl-0123456789-128"):
        assert owner.version_in(name, r"-\d+") is None
    strange = [str(Owner("etl", name)) for name in ("#1", "#2", "é", "x" * 300)]
    assert len(set(strange)) == 4, "names that no tag can hold stay apart, too"
    assert all(len(text) < 256 and text.isascii() for text in strange)

"""Where data lies, as a block."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from prefect_slo import LambdaPool
from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.blocks import S3PrefixBlock
from prefect_slo.errors import InvalidValue

STORE = S3Prefix("my-bucket", "data", "eu-west-1", None, "alias/mine")


def test_a_block_comes_back_from_the_server_and_goes_into_a_pool(prefect_server: str) -> None:
    block = S3PrefixBlock(bucket="my-bucket", prefix="data", region="eu-west-1", kms_key="alias/mine")
    block.save("data", overwrite=True)
    loaded = S3PrefixBlock.load("data")
    assert loaded.store == STORE
    assert LambdaPool(bucket=loaded).bucket == STORE


def test_a_bucket_of_prefect_aws_is_taken_as_it_is() -> None:
    """In the form of its blocks: ``S3Bucket`` with ``AwsCredentials`` and ``AwsClientParameters``."""
    parameters = SimpleNamespace(endpoint_url="http://127.0.0.1:9000")
    credentials = SimpleNamespace(region_name="eu-west-1", aws_client_parameters=parameters)
    bucket = SimpleNamespace(bucket_name="theirs", bucket_folder="some/folder/", credentials=credentials)
    assert S3Prefix.of(bucket) == S3Prefix("theirs", "some/folder", "eu-west-1", "http://127.0.0.1:9000")
    assert S3Prefix.of(SimpleNamespace(bucket_name="theirs")).prefix == "prefect-slo"


@pytest.mark.parametrize("value", [3, None, SimpleNamespace(bucket_name=3)])
def test_what_is_no_place_is_refused(value: object) -> None:
    with pytest.raises(InvalidValue):
        S3Prefix.of(value)
    with pytest.raises(ValidationError):
        S3PrefixBlock(bucket="x")

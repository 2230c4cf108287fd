"""Tables on S3, against moto's S3."""

from __future__ import annotations

from collections.abc import Iterator

import boto3
import pytest
from moto import mock_aws

from prefect_slo.errors import InvalidValue
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.tables import read_table, write_table

ROWS = StageRuns.of(
    [StageRun(run_id=str(i), stage="train", workers=2, memory_mb=1769, vcpus=1, wall_s=1.0 + i) for i in range(3)]
)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with mock_aws():
        boto3.client("s3").create_bucket(Bucket="profiles")
        yield "profiles"


@pytest.mark.parametrize("name", ["runs.csv", "nightly/runs.jsonl"])
def test_a_table_survives_the_way_to_s3_and_back(bucket: str, name: str) -> None:
    write_table(ROWS, f"s3://{bucket}/{name}")
    again = read_table(f"s3://{bucket}/{name}")
    assert again["wall_s"].tolist() == [1.0, 2.0, 3.0]
    assert again["stage"].tolist() == ["train"] * 3


def test_a_missing_object_is_named_with_the_reason(bucket: str) -> None:
    with pytest.raises(InvalidValue, match=r"s3://profiles/none\.csv.*can be read.*404"):
        read_table(f"s3://{bucket}/none.csv")


def test_a_bucket_that_does_not_exist_cannot_be_written(bucket: str) -> None:
    with pytest.raises(InvalidValue, match=r"can be written.*NoSuchBucket"):
        write_table(ROWS, "s3://elsewhere/runs.csv")


def test_nothing_is_stored_when_the_table_cannot_be_written(bucket: str) -> None:
    with pytest.raises(InvalidValue, match="ends in"):
        write_table(ROWS, f"s3://{bucket}/runs.xlsx")
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket=bucket)


@pytest.mark.parametrize("uri", ["s3://", "s3://bucket", "s3://bucket/", "s3:///key.csv"])
def test_what_is_no_object_name_is_refused(uri: str) -> None:
    with pytest.raises(InvalidValue, match="s3://bucket/key"):
        read_table(uri)

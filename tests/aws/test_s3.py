"""The data plane on moto's S3."""

from __future__ import annotations

import os
import pickle

import boto3
import moto
import pytest

from prefect_slo.aws import s3, worker
from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.errors import InvalidValue
from prefect_slo.testing.aws import Fault, Faults, LocalAws


@pytest.fixture
def store(account: LocalAws) -> S3Prefix:
    return S3Prefix.of(account.bucket)


def test_small_objects_come_back(store: S3Prefix) -> None:
    key = store.key("runs", "a", "1")
    store.put(key, b"content")
    assert store.get(key) == b"content"


def test_what_lies_under_a_name_is_listed(store: S3Prefix) -> None:
    keys = [store.key("listed", name) for name in ("a", "b")]
    for key in keys:
        store.put(f"{key}/args", b"content")
    assert store.keys("listed", "a") == [f"{keys[0]}/args"]
    assert {f"{key}/args" for key in keys} <= set(store.keys())


def test_large_objects_travel_in_parts_both_ways(store: S3Prefix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    content = os.urandom(2**20) * 11 + b"end"
    store.put("large", content)
    assert "-3" in boto3.client("s3").head_object(Bucket=store.bucket, Key="large")["ETag"]
    assert store.get("large", len(content)) == content


def test_keys_are_spread_over_the_prefix(store: S3Prefix) -> None:
    spread = {store.key("runs", str(n)).split("/")[1] for n in range(2000)}
    assert len(spread) == 256
    assert store.key("runs", "1") == store.key("runs", "1")


def test_content_that_is_there_is_written_once(store: S3Prefix) -> None:
    key = store.key("code", "abc")
    store.put_once(key, b"code")
    boto3.client("s3").delete_object(Bucket=store.bucket, Key=key)
    store.put_once(key, b"code")
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket=store.bucket, Prefix=key)
    pickle.loads(pickle.dumps(store)).put_once(key, b"code")  # another process has written nothing yet
    assert store.get(key) == b"code"


@pytest.mark.parametrize("gone", ["long ago", "deleted here"])
def test_content_that_may_have_been_deleted_is_written_again(store: S3Prefix, gone: str) -> None:
    key = store.key("code", "abd")
    assert store.put_once(key, b"code")
    if gone == "deleted here":
        assert store.delete("runs") == 0
    else:
        store._known[key] -= s3.KNOWN_S
    assert store.put_once(key, b"code")
    assert not store.put_once(key, b"code")


def test_what_one_run_left_is_deleted_and_nothing_else(store: S3Prefix) -> None:
    for run in ("a", "b"):
        for name in ("args", "result"):
            store.put(f"{store.key('runs', run)}/{name}", b"x")
    assert store.delete("runs", "a") == 2
    assert store.get(f"{store.key('runs', 'b')}/args") == b"x"


def test_what_some_work_has_left_is_forgotten_without_a_look(store: S3Prefix) -> None:
    work = [("runs", "gone", str(n)) for n in range(250)]
    for names in work[:3]:
        for part in ("args", "result"):
            store.put(f"{store.key(*names)}/{part}", b"x")
    with Faults() as faults:
        store.forget(work)
    assert faults.calls == {"s3.DeleteObjects": 2}
    assert store.delete("runs", "gone", "0") == 0


def test_leftovers_expire_and_other_rules_of_the_bucket_stay(store: S3Prefix) -> None:
    client = boto3.client("s3")
    other = {"ID": "theirs", "Filter": {"Prefix": "logs/"}, "Status": "Enabled", "Expiration": {"Days": 90}}
    client.put_bucket_lifecycle_configuration(Bucket=store.bucket, LifecycleConfiguration={"Rules": [other]})
    store.expire(1)
    store.expire(2)
    rules = client.get_bucket_lifecycle_configuration(Bucket=store.bucket)["Rules"]
    assert {(rule["ID"], rule["Expiration"]["Days"]) for rule in rules} == {
        ("theirs", 90),
        ("prefect-slo-intermediates-prefect-slo", 2),
    }


def test_objects_are_encrypted_where_a_key_is_named(account: LocalAws) -> None:
    store = S3Prefix(S3Prefix.of(account.bucket).bucket, kms_key="alias/mine")
    store.put("secret", b"x")
    head = boto3.client("s3").head_object(Bucket=store.bucket, Key="secret")
    assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "alias/mine")


@pytest.mark.parametrize("sse", ["AES256", "aws:kms", "aws:kms:dsse"])
def test_how_objects_are_encrypted_may_be_said(account: LocalAws, sse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    store = S3Prefix(S3Prefix.of(account.bucket).bucket, sse=sse)
    for key, content in (("small", b"x"), ("parts", bytes(6 * 2**20))):
        store.put(key, content)
        assert boto3.client("s3").head_object(Bucket=store.bucket, Key=key)["ServerSideEncryption"] == sse


@pytest.mark.parametrize("settings", [{"sse": "rot13"}, {"sse": "AES256", "kms_key": "alias/mine"}])
def test_encryptions_that_s3_does_not_have_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(InvalidValue):
        S3Prefix("bucket", **settings)


# ---- on the worker --------------------------------------------------------------------------------------------------


@pytest.fixture
def here(account: LocalAws, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The worker's own functions, in this process: small parts, and where they write."""
    monkeypatch.setattr(worker, "PART_BYTES", 5 * 2**20)
    monkeypatch.setitem(worker._STATE, "s3", None)
    return {"bucket": S3Prefix.of(account.bucket).bucket, "key": "worker/one"}


def test_workers_read_and_write_large_objects_in_parts_side_by_side(here: dict[str, str]) -> None:
    content = os.urandom(2**20) * 11 + b"end"
    before = {name: worker._STATE[name] for name in ("puts", "gets")}
    with Faults() as faults:
        assert worker._put(here, "result", content)
        assert worker._found(here, "result") == content
    assert faults.calls["s3.UploadPart"] == faults.calls["s3.GetObject"] == 3
    assert worker._STATE["puts"] - before["puts"] == 5, "each is a request that is paid for"
    assert worker._STATE["gets"] - before["gets"] == 3
    boto3.client("s3").delete_object(Bucket=here["bucket"], Key="worker/one/result")


@pytest.mark.skipif(
    tuple(map(int, moto.__version__.split(".")[:3])) < (5, 1, 11), reason="moto minds no condition on parts before"
)
def test_a_large_result_is_not_written_over_either(here: dict[str, str]) -> None:
    first, second = (bytes([n]) * (6 * 2**20) for n in (1, 2))
    assert worker._put(here, "result", first)
    assert not worker._put(here, "result", second)
    assert worker._found(here, "result") == first
    uploads = boto3.client("s3").list_multipart_uploads(Bucket=here["bucket"])
    assert not [one for one in uploads.get("Uploads", ()) if one["Key"].startswith("worker/")], "none is left open"
    boto3.client("s3").delete_object(Bucket=here["bucket"], Key="worker/one/result")


def test_a_worker_that_is_told_to_slow_down_comes_back(here: dict[str, str]) -> None:
    with Faults(Fault("s3.GetObject", "slow-down", times=2), Fault("s3.PutObject", "slow-down", times=1)) as faults:
        assert worker._put(here, "claim", b"mine")
        assert worker._found(here, "claim") == b"mine"
        assert worker._found(here, "nothing") is None
    assert faults.calls["s3.GetObject"] == 4


@pytest.mark.parametrize("value", ["bucket/prefix", "s3://", "", "https://bucket"])
def test_a_prefix_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(InvalidValue, match="s3://bucket/prefix"):
        S3Prefix.of(value)

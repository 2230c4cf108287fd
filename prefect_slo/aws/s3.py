"""The data plane: arguments, functions and results that don't fit into a request, as objects under one prefix.

Keys begin with two hexadecimal digits of their name's hash: S3 partitions by key, and one prefix takes 3,500 writes a
second. Large objects are read in parallel ranges and written in parts. S3 asks callers to slow down with a 503; boto3's
standard mode backs off and tries again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from prefect_slo.aws.clients import client
from prefect_slo.errors import InvalidValue

PART_BYTES = 8 * 2**20
"""Size of a part, and of a range: S3 gives one connection about 90 MB/s."""

STREAMS = 8
ATTEMPTS = 8
"""Calls at most, with standard mode's back-off: up to about a minute of being told to slow down."""

ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")

PARTS = ("args", "array", "claim", "event", "reply", "result")
"""What may be stored for one invocation, under its key."""

KNOWN_S = 6 * 3600.0
"""An object that was written longer ago is written again: a rule of the bucket deletes it after a day."""

_RETRIEVED_S = 60.0
_DELETED = 1000  # objects to a request, at most
LIFECYCLE = "prefect-slo-intermediates"


@dataclass(frozen=True)
class S3Prefix:
    """Where objects lie.

    Attributes:
        bucket: Its bucket.
        prefix: Put before every key; with or without a slash at the end.
        region: ``None`` as boto3 finds it.
        endpoint: ``None`` for AWS.
        kms_key: Key that objects are encrypted with; ``None`` leaves it to the bucket's own default.
        sse: How: ``AES256`` (S3's own keys), ``aws:kms`` or ``aws:kms:dsse`` (twice); by default as the bucket says,
            and ``aws:kms`` with a ``kms_key``.

    Raises:
        InvalidValue: An encryption that S3 does not have, or S3's own keys beside another.
    """

    bucket: str
    prefix: str = "prefect-slo"
    region: str | None = None
    endpoint: str | None = None
    kms_key: str | None = None
    sse: str | None = None
    _known: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.sse not in (None, *ENCRYPTIONS):
            raise InvalidValue("s3.sse", self.sse, f"one of {', '.join(ENCRYPTIONS)}")
        if self.sse == "AES256" and self.kms_key:
            raise InvalidValue("s3.kms_key", self.kms_key, "none beside AES256, or sse='aws:kms'")

    @classmethod
    def of(cls, value: Any, **options: Any) -> S3Prefix:
        """A prefix from itself, from ``s3://bucket/prefix``, or from a block: ours, or ``S3Bucket`` of prefect-aws.

        Of the latter, bucket, folder, region and endpoint are taken; credentials are found as boto3 finds them.

        Raises:
            InvalidValue: None of these.
        """
        if isinstance(value, S3Prefix):
            return value
        if isinstance(store := getattr(value, "store", None), S3Prefix):
            return store
        if isinstance(bucket := getattr(value, "bucket_name", None), str):
            credentials = getattr(value, "credentials", None)
            asked = getattr(credentials, "aws_client_parameters", None)
            return cls(
                bucket,
                (getattr(value, "bucket_folder", "") or "prefect-slo").strip("/"),
                getattr(credentials, "region_name", None),
                getattr(asked, "endpoint_url", None),
            )
        bucket, _, prefix = str(value).removeprefix("s3://").partition("/")
        if not isinstance(value, str) or not value.startswith("s3://") or not bucket:
            raise InvalidValue("bucket", value, "s3://bucket/prefix")
        return cls(bucket, prefix.strip("/") or "prefect-slo", **options)

    def under(self, folder: str) -> S3Prefix:
        """The same place, one level down."""
        return replace(self, prefix="/".join(part for part in (self.prefix.strip("/"), folder) if part))

    def near(self, region: str | None, endpoint: str | None) -> S3Prefix:
        """The same place, asked for as a pool asks for its own, unless it has a region or an endpoint already."""
        return replace(self, region=self.region or region, endpoint=self.endpoint or endpoint)

    @property
    def encryption(self) -> dict[str, str]:
        """Encryption arguments of a write."""
        asked = self.sse or ("aws:kms" if self.kms_key else None)
        if asked is None:
            return {}
        return {"ServerSideEncryption": asked, **({"SSEKMSKeyId": self.kms_key} if self.kms_key else {})}

    def key(self, *names: str) -> str:
        """The key of an object, spread over the prefix by the hash of its names."""
        spread = hashlib.sha256("/".join(names).encode()).hexdigest()[:2]
        return "/".join((self.prefix.strip("/"), spread, *names))

    def put(self, key: str, body: bytes) -> None:
        """Write an object; large ones in parts, several at a time."""
        if len(body) <= PART_BYTES:
            self._s3.put_object(Bucket=self.bucket, Key=key, Body=body, **self.encryption)
            return
        s3, where = self._s3, {"Bucket": self.bucket, "Key": key}
        upload = {**where, "UploadId": s3.create_multipart_upload(**where, **self.encryption)["UploadId"]}
        try:
            starts = range(0, len(body), PART_BYTES)

            def part(number: int) -> dict[str, Any]:
                chunk = body[starts[number] : starts[number] + PART_BYTES]
                return {
                    "PartNumber": number + 1,
                    "ETag": s3.upload_part(PartNumber=number + 1, Body=chunk, **upload)["ETag"],
                }

            with ThreadPoolExecutor(STREAMS) as pool:
                parts = list(pool.map(part, range(len(starts))))
            s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except BaseException:
            with suppress(Exception):  # what went wrong first is what is told
                s3.abort_multipart_upload(**upload)
            raise

    def put_once(self, key: str, body: bytes) -> bool:
        """Write an object whose key names its content, unless this process has just done so; whether it did so now."""
        now = time.monotonic()
        if now - self._known.get(key, float("-inf")) < KNOWN_S:
            return False
        self.put(key, body)
        self._known[key] = now
        return True

    def get(self, key: str, size: int | None = None) -> bytes:
        """Read an object; where its ``size`` is known and large, in parallel ranges."""
        if size is None or size <= PART_BYTES:
            return bytes(self._s3.get_object(Bucket=self.bucket, Key=key)["Body"].read())
        return self.get_range(key, 0, size)

    def get_range(self, key: str, at: int, size: int) -> bytes:
        """Read so many bytes of an object; many, in parallel."""

        def part(start: int) -> bytes:
            end = min(start + PART_BYTES, at + size) - 1
            got = self._s3.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{end}")
            return bytes(got["Body"].read())

        if size <= PART_BYTES:
            return part(at)
        with ThreadPoolExecutor(STREAMS) as pool:
            return b"".join(pool.map(part, range(at, at + size, PART_BYTES)))

    def keys(self, *names: str) -> list[str]:
        """Keys of what lies under these names, over the whole prefix without any."""
        return [key for page in self._pages(names) for key in page]

    def delete(self, *names: str) -> int:
        """Delete what lies under these names, over the whole prefix without any; returns how many objects."""
        self._known.clear()
        deleted = 0
        for page in self._pages(names):
            objects = [{"Key": key} for key in page]
            self._s3.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
            deleted += len(page)
        return deleted

    def forget(self, work: Iterable[tuple[str, ...]]) -> None:
        """Delete what was stored for some work, without asking what there is."""
        keys = [{"Key": f"{self.key(*names)}/{part}"} for names in work for part in PARTS]
        for at in range(0, len(keys), _DELETED):
            self._s3.delete_objects(Bucket=self.bucket, Delete={"Objects": keys[at : at + _DELETED], "Quiet": True})

    def expire(self, days: int) -> None:
        """Have S3 delete what is left under the prefix after some days; other rules of the bucket stay."""
        rule = {
            "ID": self._rule,
            "Filter": {"Prefix": self.prefix.strip("/") + "/"},
            "Status": "Enabled",
            "Expiration": {"Days": days},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": days},
        }
        self._put_rules([*(other for other in self._rules() if other.get("ID") != self._rule), rule])

    def keep(self) -> None:
        """Have S3 delete nothing under the prefix any more; other rules of the bucket stay."""
        rules = self._rules()
        others = [other for other in rules if other.get("ID") != self._rule]
        if len(others) == len(rules):
            return
        if others:
            self._put_rules(others)
        else:
            self._s3.delete_bucket_lifecycle(Bucket=self.bucket)

    def _pages(self, names: tuple[str, ...]) -> Iterator[list[str]]:
        """Keys under some names, up to a thousand at a time."""
        under = self.key(*names) + "/" if names else self.prefix.strip("/") + "/"
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=under)
        for page in pages:
            if found := page.get("Contents"):
                yield [each["Key"] for each in found]

    @property
    def _rule(self) -> str:
        """The id of its rule: at most 255 characters, so that a long prefix goes by its hash."""
        prefix = self.prefix.strip("/")
        return f"{LIFECYCLE}-{prefix if len(prefix) <= 200 else hashlib.sha256(prefix.encode()).hexdigest()}"

    def _rules(self) -> list[dict[str, Any]]:
        from botocore.exceptions import ClientError

        try:
            return list(self._s3.get_bucket_lifecycle_configuration(Bucket=self.bucket)["Rules"])
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchLifecycleConfiguration":
                raise
            return []

    def _put_rules(self, rules: list[dict[str, Any]]) -> None:
        self._s3.put_bucket_lifecycle_configuration(Bucket=self.bucket, LifecycleConfiguration={"Rules": rules})

    @property
    def _s3(self) -> Any:
        return client(
            "s3", region=self.region, endpoint=self.endpoint, read_s=_RETRIEVED_S, connections=64, attempts=ATTEMPTS
        )

    def __getstate__(self) -> Mapping[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_known"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, _known={})

"""A block for where arguments and results lie that are too large for a request."""

from __future__ import annotations

from typing import ClassVar

from prefect.blocks.core import Block
from pydantic import Field, HttpUrl

from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.blocks.documents import DOCUMENTATION, LOGO


class S3PrefixBlock(Block):
    """A prefix of an S3 bucket, for what flows send to workers elsewhere and get back.

    Credentials are found as boto3 finds them: environment, profile, or the role of the machine.

    Example:
        Use a prefix that is stored on the server:
        ```python
        from prefect_slo import LambdaPool
        from prefect_slo.blocks import S3PrefixBlock

        lambdas = LambdaPool(bucket=S3PrefixBlock.load("BLOCK_NAME"))
        ```
    """

    _block_type_name: ClassVar[str] = "SLO S3 Prefix"
    _block_type_slug: ClassVar[str] = "slo-s3-prefix"
    _logo_url: ClassVar[HttpUrl] = LOGO
    _documentation_url: ClassVar[HttpUrl] = DOCUMENTATION

    bucket: str = Field(description="Name of the bucket.", min_length=3)
    prefix: str = Field(default="prefect-slo", description="Put before every key.")
    region: str | None = Field(default=None, description="Region of the bucket; by default as boto3 finds it.")
    endpoint: str | None = Field(default=None, description="Address of something that stands for S3.")
    kms_key: str | None = Field(default=None, description="Key that objects are encrypted with.")

    sse: str | None = Field(default=None, description="AES256, aws:kms or aws:kms:dsse; by default as the bucket says.")

    @property
    def store(self) -> S3Prefix:
        """The prefix as a value."""
        return S3Prefix(self.bucket, self.prefix, self.region, self.endpoint, self.kms_key, self.sse)

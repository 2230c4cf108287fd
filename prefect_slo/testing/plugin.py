"""Fixtures for pytest, found by entry point; none is used unless a test asks for it.

``-p no:prefect_slo`` leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def slo_aws() -> Iterator[Any]:
    """A mocked AWS account (``LocalAws``) whose Lambda functions really run; nothing leaves this machine."""
    pytest.importorskip("moto", reason="needs prefect-slo[testing]")
    pytest.importorskip("awslambdaric", reason="needs prefect-slo[testing]")
    from prefect_slo.testing.aws import local_aws

    with local_aws() as account:
        yield account


@pytest.fixture
def slo_lambda(slo_aws: Any) -> Any:
    """The ``LocalLambda`` of ``slo_aws``: its concurrency, its clock of CPU shares, what it has run."""
    return slo_aws.lambdas


@pytest.fixture
def slo_batch(slo_aws: Any) -> Any:
    """The ``LocalBatch`` of ``slo_aws``: queues, GPUs, machines that are taken back, how its jobs have ended."""
    return slo_aws.batch


@pytest.fixture
def slo_s3(slo_aws: Any) -> Any:
    """The bucket of ``slo_aws`` as an ``S3Prefix``: what runs have left there, and a place for a test's own objects."""
    from prefect_slo.aws.s3 import S3Prefix

    return S3Prefix.of(slo_aws.bucket, region="us-east-1")


@pytest.fixture
def slo_faults(slo_aws: Any) -> Iterator[Any]:
    """Faults (``Faults``) of the mocked account; none until some are added."""
    from prefect_slo.testing.aws import Faults

    with Faults() as faults:
        yield faults

"""AWS for tests: functions that really run behind moto, faults, and no way out of this machine."""

from __future__ import annotations

from prefect_slo.testing.aws.batches import LocalBatch
from prefect_slo.testing.aws.faults import Fault, Faults
from prefect_slo.testing.aws.guard import RealAwsCall, fake_credentials, no_real_aws
from prefect_slo.testing.aws.lambdas import Invocation, LocalLambda
from prefect_slo.testing.aws.place import LocalAws, local_aws

__all__ = [
    "Fault",
    "Faults",
    "Invocation",
    "LocalAws",
    "LocalBatch",
    "LocalLambda",
    "RealAwsCall",
    "fake_credentials",
    "local_aws",
    "no_real_aws",
]

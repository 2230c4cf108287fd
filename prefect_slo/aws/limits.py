"""Limits of AWS Lambda, checked here: botocore's own model allows what only some kinds of function can have."""

from __future__ import annotations

from prefect_slo.errors import InvalidValue
from prefect_slo.units import whole

MEMORY_MB = (128, 10_240)
TIMEOUT_S = (1, 900)
STORAGE_MB = (512, 10_240)
INIT_S = 10
"""The start of an environment takes so long at most."""

MB_PER_VCPU = 1769.0
PAYLOAD_BYTES = 6_291_456
"""A synchronous request, or its reply, as JSON."""

LAYERS = 5
ENVIRONMENT_BYTES = 4096
ZIP_BYTES = 50 * 2**20
UNRESERVED = 100
"""Concurrency that an account must leave to functions without a reservation."""


def memory_mb(value: object) -> int:
    """A memory size of a function, in MB.

    Raises:
        InvalidValue: Not a whole number within the limits.
    """
    return _within(value, MEMORY_MB, "lambda.memory_mb", "MB")


def timeout_s(value: object) -> int:
    """A timeout of a function, in seconds; likewise."""
    return _within(value, TIMEOUT_S, "lambda.timeout_s", "s; longer work belongs on AWS Batch")


def storage_mb(value: object) -> int:
    """Temporary disk of a function, in MB; likewise."""
    return _within(value, STORAGE_MB, "lambda.storage_mb", "MB")


def vcpus(memory: int) -> float:
    """vCPUs that come with a memory size."""
    return memory / MB_PER_VCPU


def _within(value: object, limits: tuple[int, int], field: str, unit: str) -> int:
    least, most = limits
    number = whole(value, field)
    if not least <= number <= most:
        raise InvalidValue(field, value, f"{least} to {most} {unit}")
    return number

"""What keeps AWS from doing what it is asked to, as an error that says what to do next."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from prefect_slo.errors import AwsRefused

SIGN_IN = "Run 'aws configure' or 'aws sso login', set AWS_PROFILE, or give this machine a role."
PERMIT = "'prefect-slo aws policy' prints what has to be allowed."
DEPLOY = "'prefect-slo aws deploy' makes what is missing."
QUEUE = "Make it, or give BatchJobs a BatchQueue, which 'prefect-slo aws deploy' makes."
BUCKET = "Make the bucket (aws s3 mb s3://{}), or name one that there is."
REGION = "Give the pool a region=, set AWS_DEFAULT_REGION, or name one in the profile."
PACKAGES = (
    "What tasks import is brought by the pool's layers= or image=, or by the image of its jobs. On Lambda Prefect is "
    "not there unless one of them brings it (print() in place of a logger); the image of jobs has it."
)
_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AllAccessDisabled"})
_SIGNED_OUT = frozenset(
    {
        "ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "UnrecognizedClientException",
        "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSignatureException",
    }
)  # fmt: skip


_NOT_FOUND = re.compile(r"not ?found|does not exist", re.IGNORECASE)


@contextmanager
def plainly(then: str = "") -> Iterator[None]:
    """Inside, what boto3 raises comes out as ``AwsRefused``.

    Args:
        then: What to do next where nothing better is known.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (ClientError, BotoCoreError) as error:
        raise refused(error, then) from error


def refused(error: Exception, then: str = "") -> AwsRefused:
    """What an exception of boto3 says, and what to do next."""
    from botocore import exceptions as boto

    match error:
        case boto.ClientError():
            told, operation = error.response.get("Error", {}), error.operation_name
            code, why = str(told.get("Code", "")), f"{told.get('Code', '')}: {told.get('Message', '')}".strip(": ")
            then = PERMIT if code in _DENIED else SIGN_IN if code in _SIGNED_OUT else then
            if code == "NoSuchBucket":
                then = BUCKET.format(told.get("BucketName", "my-bucket"))
            return AwsRefused(operation, why, then)
        case boto.NoRegionError():
            return AwsRefused("", "no region is set", REGION)
        case boto.WaiterError():
            reason = (error.last_response or {}).get("Configuration", {}).get("StateReason", "") or error
            return AwsRefused(error.kwargs.get("name", ""), str(reason), then)
        case boto.ConnectionError() | boto.HTTPClientError():
            return AwsRefused("", f"it cannot be reached ({error})", "Look at the network, the region and endpoint=.")
        case (
            boto.NoCredentialsError()
            | boto.PartialCredentialsError()
            | boto.CredentialRetrievalError()
            | boto.ProfileNotFound()
            | boto.SSOError()
            | boto.TokenRetrievalError()
        ):
            return AwsRefused("", str(error).rstrip("."), SIGN_IN)
    return AwsRefused("", f"{type(error).__name__}: {error}".rstrip("."), then)


def with_packages(words: str) -> str:
    """Words about a failure on a worker, with what to do where a package lacks there."""
    return f"{words.rstrip('.')}. {PACKAGES}" if words.startswith("ModuleNotFoundError") else words


def with_advice(words: str, error: Exception) -> str:
    """Words about an exception of boto3, with what to do next where that is known."""
    told = getattr(error, "response", {}).get("Error", {})
    said = f"{told.get('Code', '')}: {told.get('Message', '')}"
    missing = (QUEUE if "queue" in said.lower() else DEPLOY) if _NOT_FOUND.search(said) else ""
    then = refused(error, missing).then
    return f"{words.rstrip('.')}. {then}" if then else words

"""What keeps AWS from doing what it is asked to is told with what to do next."""

from __future__ import annotations

import pytest
from botocore import exceptions as boto
from botocore.exceptions import ClientError

from prefect_slo.aws.refusals import (
    DEPLOY,
    PERMIT,
    QUEUE,
    REGION,
    SIGN_IN,
    plainly,
    refused,
    with_advice,
    with_packages,
)
from prefect_slo.errors import AwsRefused


def denied(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "no"}}, "CreateFunction")


def inactive() -> boto.WaiterError:
    answer = {"Configuration": {"State": "Failed", "StateReason": "The image cannot be read."}}
    return boto.WaiterError(name="FunctionActiveV2", reason="terminal failure", last_response=answer)


@pytest.mark.parametrize(
    ("error", "said", "then"),
    [
        (denied("AccessDeniedException"), "asked for CreateFunction: AccessDeniedException: no", PERMIT),
        (denied("ExpiredTokenException"), "ExpiredTokenException", SIGN_IN),
        (denied("ResourceConflict"), "ResourceConflict: no", "Look."),
        (denied("NoSuchBucket"), "NoSuchBucket", "aws s3 mb s3://my-bucket"),
        (boto.NoRegionError(), "no region is set", REGION),
        (boto.NoCredentialsError(), "Unable to locate credentials", SIGN_IN),
        (boto.ProfileNotFound(profile="prod"), "prod", SIGN_IN),
        (boto.SSOTokenLoadError(error_msg="old"), "SSO", SIGN_IN),
        (boto.EndpointConnectionError(endpoint_url="https://x"), "it cannot be reached", "region"),
        (boto.ReadTimeoutError(endpoint_url="https://x"), "it cannot be reached", "region"),
        (inactive(), "FunctionActiveV2: The image cannot be read.", "Look."),
        (boto.ParamValidationError(report="a size"), "a size", "Look."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_cause_has_its_next_step(error: Exception, said: str, then: str) -> None:
    told = refused(error, "Look.")
    assert said in str(told)
    assert then in told.then


def test_what_boto3_raises_comes_out_as_one_kind_and_nothing_else_does() -> None:
    with pytest.raises(AwsRefused, match="ResourceConflict"), plainly():
        raise denied("ResourceConflict")
    with pytest.raises(KeyError), plainly():
        raise KeyError("mine")


def test_what_a_worker_cannot_import_is_said_with_what_brings_it_there() -> None:
    told = with_packages("ModuleNotFoundError: No module named 'prefect'")
    assert "On Lambda Prefect is not there" in told
    assert "the image of jobs has it" in told
    assert with_packages("KeyError: 'prefect'") == "KeyError: 'prefect'"


def test_a_queue_that_is_not_there_is_made_by_who_named_it() -> None:
    gone = ClientError({"Error": {"Code": "ClientException", "Message": "Job queue q does not exist"}}, "SubmitJob")
    assert with_advice("no job", gone) == f"no job. {QUEUE}"
    assert with_advice("no call", denied("ResourceNotFoundException")) == f"no call. {DEPLOY}"

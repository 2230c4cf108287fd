"""What AWS answers to a deployment: settings, permissions and a role that is not known yet are told apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from botocore.stub import Stubber

from prefect_slo.aws.clients import forget_clients
from prefect_slo.aws.functions import ROLE_TRIES, ROLE_WAIT_S, WorkerFunctions
from prefect_slo.aws.ownership import Owner
from prefect_slo.aws.queues import BatchQueue
from prefect_slo.aws.refusals import PERMIT
from prefect_slo.errors import AwsRefused, InvalidValue

FUNCTIONS = WorkerFunctions(role="arn:aws:iam::123456789012:role/worker", region="us-east-1")
QUEUE = BatchQueue("jobs", subnets=("subnet-1",), security_groups=("sg-1",), region="us-east-1")
UNKNOWN_ROLE = ("InvalidParameterValueException", "The role defined for the function cannot be assumed by Lambda.")


@pytest.fixture
def lambdas() -> Iterator[Stubber]:
    forget_clients()
    with Stubber(FUNCTIONS._lambda) as answers:
        answers.add_client_error("get_function_configuration", "ResourceNotFoundException")
        yield answers
    forget_clients()


def deployed(waits: list[float] | None = None) -> list[str]:
    return FUNCTIONS.deploy([512], (waits if waits is not None else []).append)


def test_who_may_not_deploy_is_told_what_to_allow(lambdas: Stubber) -> None:
    lambdas.add_client_error("create_function", "AccessDeniedException", "no", 403)
    with pytest.raises(AwsRefused, match="CreateFunction: AccessDenied") as told:
        deployed()
    assert told.value.then == PERMIT


def test_who_may_not_even_look_is_told_what_to_allow() -> None:
    forget_clients()
    with Stubber(FUNCTIONS._lambda) as answers:
        answers.add_client_error("get_function_configuration", "AccessDeniedException", "no", 403)
        with pytest.raises(AwsRefused, match="GetFunctionConfiguration: AccessDenied") as told:
            deployed()
    forget_clients()
    assert told.value.then == PERMIT


def test_a_role_that_was_just_made_is_waited_for(lambdas: Stubber) -> None:
    waits: list[float] = []
    active: dict[str, Any] = {"Configuration": {"State": "Active", "LastUpdateStatus": "Successful"}}
    lambdas.add_client_error("create_function", *UNKNOWN_ROLE)
    lambdas.add_response("create_function", {})
    lambdas.add_response("get_function", active)
    assert deployed(waits) == [FUNCTIONS.name(512)]
    assert waits == [ROLE_WAIT_S]


def test_a_role_that_lambda_never_may_assume_is_refused_in_the_end(lambdas: Stubber) -> None:
    waits: list[float] = []
    for _ in range(ROLE_TRIES):
        lambdas.add_client_error("create_function", *UNKNOWN_ROLE)
    with pytest.raises(InvalidValue, match="cannot be assumed"):
        deployed(waits)
    assert len(waits) == ROLE_TRIES - 1


@pytest.mark.parametrize(("code", "kind"), [("AccessDeniedException", AwsRefused), ("ClientException", InvalidValue)])
def test_a_queue_tells_the_same_two_apart(code: str, kind: type[Exception]) -> None:
    forget_clients()
    with Stubber(QUEUE._batch) as answers:
        answers.add_client_error("create_compute_environment", code)
        with pytest.raises(kind, match=code):
            QUEUE._create_environment(Owner("prefect-slo", "batch"))
    forget_clients()

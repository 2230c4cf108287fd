"""What the test bed takes from moto: a test for every symbol that it replaces or reads, so that a change is named."""

from __future__ import annotations

import inspect
from typing import Any

import boto3
import pytest

from prefect_slo.testing.aws import LocalAws, local_aws


@pytest.fixture
def function() -> Any:
    """A function as moto keeps it."""
    from moto.awslambda.models import lambda_backends

    with local_aws() as account:
        name = account.pool(memory_mb=(256,), bucket=None, environment={"A": "1"}).functions.name(256)
        boto3.client("lambda").put_function_concurrency(FunctionName=name, ReservedConcurrentExecutions=7)
        [found] = [
            kept
            for number in list(lambda_backends)
            if "us-east-1" in lambda_backends[number]
            for kept in lambda_backends[number]["us-east-1"].list_functions()
            if kept.function_name == name
        ]
        yield found


def test_every_invocation_passes_one_method() -> None:
    from moto.awslambda.models import LambdaFunction

    parameters = list(inspect.signature(LambdaFunction.invoke).parameters)
    assert parameters == ["self", "body", "request_headers", "response_headers"]


def test_every_request_of_botocore_passes_one_method() -> None:
    from moto.core.botocore_stubber import BotocoreStubber

    assert list(inspect.signature(BotocoreStubber.__call__).parameters)[1:3] == ["event_name", "request"]


def test_a_function_has_what_a_sandbox_is_made_from(function: Any) -> None:
    assert isinstance(function.code_bytes, bytes)
    assert (int(function.memory_size), float(function.timeout), function.environment_vars) == (256, 30.0, {"A": "1"})
    assert function.handler == "prefect_slo_worker.handler"
    assert function.function_arn.endswith(function.function_name)
    assert str(function.version) == "$LATEST"
    assert int(function.reserved_concurrency) == 7
    assert int(function.ephemeral_storage) == 512
    assert function.event_invoke_config == []
    assert (function.package_type, list(function.layers)) == ("Zip", [])


def test_a_function_keeps_how_often_its_events_are_tried(function: Any) -> None:
    client = boto3.client("lambda")
    client.put_function_event_invoke_config(
        FunctionName=function.function_name, MaximumRetryAttempts=1, DestinationConfig={}
    )
    assert function.event_invoke_config[-1].config["MaximumRetryAttempts"] == 1


def test_a_functions_tags_are_told_by_its_arn(function: Any) -> None:
    found = boto3.client("lambda").list_tags(Resource=function.function_arn)["Tags"]
    assert found["prefect-slo:pool"] == "prefect-slo/lambda"


def test_a_refusal_is_turned_into_a_response() -> None:
    from moto.awslambda.exceptions import LambdaClientError

    error = LambdaClientError("Code", "message")
    assert error.description
    assert hasattr(error, "code")


def test_paths_that_moto_leaves_unanswered_can_be_added() -> None:
    from moto.awslambda.urls import url_paths

    from prefect_slo.testing.aws.kept import ACCOUNT_SETTINGS

    assert all(callable(answer) for answer in url_paths.values())
    assert not any("account-settings" in path for path in url_paths), "moto answers by itself now: leave it to moto"
    with local_aws():
        assert ACCOUNT_SETTINGS in url_paths
        limit = boto3.client("lambda").get_account_settings()["AccountLimit"]
        assert limit["ConcurrentExecutions"] == limit["UnreservedConcurrentExecutions"] == 1000
    assert ACCOUNT_SETTINGS not in url_paths


def test_a_job_is_a_thread_whose_run_can_be_replaced() -> None:
    from moto.batch.models import Job

    assert list(inspect.signature(Job.run).parameters) == ["self"]
    used = (
        "_mark_stopped", "_start_attempt", "_get_attempt_duration", "_get_container_property",
        "_add_parameters_to_command",
    )  # fmt: skip
    for name in used:
        assert callable(getattr(Job, name)), name


def test_jobs_are_found_by_their_names_and_definitions_tell_their_tags() -> None:
    from moto.batch.models import batch_backends

    with local_aws() as account:
        client, queue = boto3.client("batch"), account.batch.queue()
        needs = [{"type": "VCPU", "value": "1"}, {"type": "MEMORY", "value": "512"}]
        container = {"image": "image", "command": ["python", "-c", "pass"], "resourceRequirements": needs}
        client.register_job_definition(
            jobDefinitionName="one", type="container", containerProperties=container, tags={"whose": "mine"}
        )
        [found] = client.describe_job_definitions(jobDefinitionName="one")["jobDefinitions"]
        assert found["tags"] == {"whose": "mine"}
        made = [client.submit_job(jobName=f"job-{n}", jobQueue=queue, jobDefinition="one")["jobId"] for n in range(2)]
        [backend] = [found["us-east-1"] for found in batch_backends.values() if "us-east-1" in found]
        job = backend.get_job_by_id(made[0])
        used = (
            "status", "stop", "job_id", "job_name", "job_stopped", "job_stopped_reason", "job_started_at", "exit_code",
            "all_jobs", "array_properties", "_child_jobs", "log_stream_name", "_stream_name", "_log_backend",
            "_log_group", "latest_attempt",
        )  # fmt: skip
        assert [name for name in used if not hasattr(job, name)] == []
        assert job.job_definition._get_resource_requirement("gpu", 0) == 0
        assert not job.job_definition.retry_strategy
        named = [{"name": "JOB_NAME", "values": ["job-1"]}]
        assert [job["jobId"] for job in client.list_jobs(jobQueue=queue, filters=named)["jobSummaryList"]] == made[1:]


def test_a_mocked_account_and_its_server_have_one_state() -> None:
    with local_aws() as account:
        there = boto3.client("s3", endpoint_url=account.endpoint)
        there.put_object(Bucket="prefect-slo-test", Key="there", Body=b"1")
        here = boto3.client("s3").get_object(Bucket="prefect-slo-test", Key="there")["Body"].read()
        assert here == b"1"
        assert isinstance(account, LocalAws)


def test_layers_are_kept_with_their_content_and_images_with_their_command() -> None:
    from moto.awslambda.models import ImageConfig, LambdaBackend

    assert list(inspect.signature(LambdaBackend.layers_versions_by_arn).parameters)[1:] == ["layer_version_arn"]
    assert ImageConfig({"Command": ["module.handler"]}).cmd == ["module.handler"]


def test_jobs_of_an_array_know_their_index_and_the_array_its_jobs() -> None:
    from moto.batch.models import Job

    parameters = inspect.signature(Job.__init__).parameters
    assert {"array_properties", "all_jobs", "provided_job_id"} <= set(parameters)
    assert callable(Job._mark_stopped)

"""The stand-alone endpoint: another process reaches functions that really run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator

import boto3
import pytest

from prefect_slo import LambdaPool
from prefect_slo.testing.aws import fake_credentials, no_real_aws

pytestmark = pytest.mark.slow  # a process that imports all of moto


@pytest.fixture
def endpoint() -> Iterator[str]:
    command = [sys.executable, "-m", "prefect_slo.testing.server"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    name, _, address = server.stdout.readline().strip().partition("=")
    assert name == "AWS_ENDPOINT_URL"
    with fake_credentials(), no_real_aws():
        yield address
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=30) == 0


def test_a_pool_is_deployed_and_called_over_the_wire(endpoint: str) -> None:
    iam = boto3.client("iam", endpoint_url=endpoint)
    role = iam.create_role(RoleName="worker", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    pool = LambdaPool(memory_mb=(128,), role=role, endpoint=endpoint, region="us-east-1")
    [name] = pool.deploy()
    reply = boto3.client("lambda", endpoint_url=endpoint).invoke(FunctionName=name, Payload=b'{"warm": true}')
    assert json.loads(reply["Payload"].read())["ok"]
    assert pool.destroy() == [name]

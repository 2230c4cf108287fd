"""The stand-alone endpoint: another process reaches functions that really run."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from prefect_slo import LambdaPool
from prefect_slo.testing import server
from prefect_slo.testing.aws import fake_credentials, no_real_aws

slow = pytest.mark.slow  # a process that imports all of moto


@pytest.fixture
def endpoint() -> Iterator[str]:
    command = [sys.executable, "-m", "prefect_slo.testing.server"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    name, _, address = process.stdout.readline().strip().partition("=")
    assert name == "AWS_ENDPOINT_URL"
    with fake_credentials(), no_real_aws():
        yield address
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0


@slow
def test_a_pool_is_deployed_and_called_over_the_wire(endpoint: str) -> None:
    iam = boto3.client("iam", endpoint_url=endpoint)
    role = iam.create_role(RoleName="worker", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    pool = LambdaPool(memory_mb=(128,), role=role, endpoint=endpoint, region="us-east-1")
    [name] = pool.deploy()
    reply = boto3.client("lambda", endpoint_url=endpoint).invoke(FunctionName=name, Payload=b'{"warm": true}')
    assert json.loads(reply["Payload"].read())["ok"]
    assert pool.destroy() == [name]


def test_a_port_that_is_taken_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            server.main(["--port", str(port)])
    assert ended.value.code == 2
    assert f"{port} cannot be listened on" in capsys.readouterr().err


@pytest.mark.parametrize("image", ["uri", "=folder", "uri=", "uri={folder}/nowhere"])
def test_an_image_without_its_folder_is_refused(image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        server.main(["--image", image.format(folder=tmp_path)])
    assert "URI=FOLDER" in capsys.readouterr().err

"""An AWS account on this machine for as long as a test takes: fake credentials, S3, and functions that really run."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prefect_slo.aws.clients import forget_clients
from prefect_slo.aws.concurrency import forget_allowed
from prefect_slo.testing.aws.batches import LocalBatch
from prefect_slo.testing.aws.guard import REGION, fake_credentials, no_real_aws
from prefect_slo.testing.aws.kept import check_installed, role_arn
from prefect_slo.testing.aws.lambdas import LocalLambda

BUCKET = "prefect-slo-test"


@dataclass(frozen=True)
class LocalAws:
    """A mocked account.

    Attributes:
        lambdas: Runs its functions.
        role: ARN of a role for them.
        bucket: ``s3://…`` of a bucket.
        endpoint: Where sandboxes and other processes reach it.
        batch: Runs its jobs.
    """

    lambdas: LocalLambda
    role: str
    bucket: str
    endpoint: str
    batch: LocalBatch

    def pool(self, **settings: Any) -> Any:
        """A deployed ``LambdaPool`` in this account; settings are those of the pool."""
        from prefect_slo.runner.aws_pools import LambdaPool

        pool = LambdaPool(**{"role": self.role, "bucket": self.bucket, "timeout_s": 30, "region": REGION, **settings})
        pool.deploy()
        return pool

    def layer(self, name: str, folder: str | Path) -> str:
        """Publish a folder as a layer of this account: ``bin``, ``python`` and ``lib`` below ``/opt``; its ARN."""
        import boto3

        made = boto3.client("lambda", region_name=REGION).publish_layer_version(
            LayerName=name, Content={"ZipFile": _zipped(Path(folder))}
        )
        return str(made["LayerVersionArn"])


def _zipped(folder: Path) -> bytes:
    """A folder as a zip, permissions kept."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.write(path, path.relative_to(folder))
    return buffer.getvalue()


@contextmanager
def local_aws(
    *, gpus: int = 0, images: Mapping[str, Path] = MappingProxyType({}), **settings: Any
) -> Iterator[LocalAws]:
    """Inside, AWS is moto in this process, and Lambda's handlers and Batch's jobs run.

    Their processes reach S3 through a server on the loopback interface that shares moto's state.

    Args:
        gpus: GPUs that jobs may have.
        images: Folders that stand for container images, of functions and of jobs; see ``LocalLambda``, ``LocalBatch``.
        settings: Those of ``LocalLambda``.

    Raises:
        SloError: The extra ``testing`` is not installed.
    """
    check_installed()
    import logging

    import boto3
    from moto import mock_aws
    from moto.server import ThreadedMotoServer

    with ExitStack() as stack:
        stack.enter_context(fake_credentials())
        stack.enter_context(_no_default_session())
        stack.enter_context(no_real_aws())
        stack.enter_context(mock_aws(config={"core": {"mock_credentials": False}}))
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        stack.callback(server.stop)
        _forget()
        stack.callback(_forget)
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        boto3.client("s3", region_name=REGION).create_bucket(Bucket=BUCKET)
        lambdas = stack.enter_context(LocalLambda(endpoint=endpoint, images=images, **settings))
        batch = stack.enter_context(LocalBatch(endpoint=endpoint, gpus=gpus, images=images))
        yield LocalAws(lambdas, role_arn(), f"s3://{BUCKET}/prefect-slo", endpoint, batch)


@contextmanager
def _no_default_session() -> Iterator[None]:
    """Inside, ``boto3.client`` makes a session of its own; one from before has the keys of before, and comes back."""
    import boto3

    before, boto3.DEFAULT_SESSION = boto3.DEFAULT_SESSION, None
    try:
        yield
    finally:
        boto3.DEFAULT_SESSION = before


def _forget() -> None:
    """Nothing that another account has said holds in this one, nor after it."""
    forget_clients()
    forget_allowed()

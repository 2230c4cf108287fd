"""Functions as moto keeps them: read into what a sandbox is made from, and the answers that moto itself lacks.

All that the test bed takes of moto's Lambda is here; ``tests/testing/test_moto_contract.py`` has a test for each of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefect_slo.aws.packaging import HANDLER
from prefect_slo.errors import SloError
from prefect_slo.testing.aws.guard import REGION
from prefect_slo.testing.aws.sandbox import Spec

ACCOUNT_SETTINGS = "{0}/(?P<api_version>[^/]+)/account-settings/?$"
"""A path that moto leaves unanswered."""

RETRIES = 2
"""Of an asynchronous event, unless the function says otherwise."""


class Kept:
    """Reads moto's functions; their code and layers are unpacked once for each content.

    Args:
        folder: Where that is unpacked.
        images: Folders that stand for container images, by URI.
    """

    def __init__(self, folder: Path, images: Mapping[str, Path]) -> None:
        self.images, self._folder, self._lock = dict(images), folder, threading.Lock()

    def spec(self, function: Any) -> Spec:
        """What a sandbox of a function is made from.

        Raises:
            LambdaClientError: It is one of an image that no folder stands for.
        """
        code = self._image(function) if function.package_type == "Image" else self._unpacked(function.code_bytes)
        variables = function.environment_vars or {}
        return Spec(
            function.function_name,
            function.function_arn,
            str(function.version),
            code,
            _handler(function),
            int(function.memory_size),
            float(function.timeout),
            tuple(sorted((str(name), str(value)) for name, value in variables.items())),
            tuple(self._unpacked(_layer_zip(layer["Arn"])) for layer in function.layers),
            int(function.ephemeral_storage),
        )

    def _image(self, function: Any) -> Path:
        uri = function.code.get("ImageUri", "")
        if uri not in self.images:
            words = f"no image is run here; name a folder that stands for it: images={{{uri!r}: folder}}"
            raise refusal(502, "InvalidRuntimeException", words)
        return self.images[uri]

    def _unpacked(self, content: bytes) -> Path:
        folder = self._folder / f"code-{hashlib.sha256(content).hexdigest()[:16]}"
        with self._lock:
            if not folder.exists():
                fresh = folder.with_suffix(".new")
                _extract(content, fresh)
                fresh.rename(folder)
        return folder


def check_installed() -> None:
    """The extra has what the test bed runs on.

    Raises:
        SloError: It isn't there.
    """
    if missing := [name for name in ("moto", "awslambdaric") if find_spec(name) is None]:
        raise SloError(f"the test bed of AWS needs {' and '.join(missing)}: pip install 'prefect-slo[testing]'")


def reserved(function: Any) -> int | None:
    """Concurrency that is set aside for a function."""
    return None if function.reserved_concurrency is None else int(function.reserved_concurrency)


def retries(function: Any) -> int:
    """How often an asynchronous event is tried again that has failed."""
    asked = function.event_invoke_config
    return int(asked[-1].config.get("MaximumRetryAttempts", RETRIES)) if asked else RETRIES


def account_settings(request: Any, concurrency: int) -> tuple[int, dict[str, str], str]:
    """``GetAccountSettings``: the concurrency of the account, and what functions have not reserved of it."""
    from moto.awslambda.models import lambda_backends

    region = _region(request)
    functions = [
        function
        for account in list(lambda_backends)
        if region in lambda_backends[account]
        for function in lambda_backends[account][region].list_functions()
    ]
    limit = {
        "ConcurrentExecutions": concurrency,
        "UnreservedConcurrentExecutions": max(concurrency - sum(reserved(each) or 0 for each in functions), 0),
        "TotalCodeSize": 80_530_636_800,
        "CodeSizeUnzipped": 262_144_000,
        "CodeSizeZipped": 52_428_800,
    }
    usage = {"FunctionCount": len(functions), "TotalCodeSize": 0}
    return 200, {"Content-Type": "application/json"}, json.dumps({"AccountLimit": limit, "AccountUsage": usage})


def refusal(status: int, code: str, message: str, **fields: str) -> Exception:
    """An error that moto turns into AWS's response."""
    from moto.awslambda.exceptions import LambdaClientError

    error: Any = LambdaClientError(code, message)
    error.code = status
    error.description = json.dumps({"__type": code, "Type": "User", "message": message, **fields})
    return error  # type: ignore[no-any-return]


def moto_paths() -> dict[str, Any]:
    """What moto answers for Lambda, by path."""
    from moto.awslambda.urls import url_paths

    return url_paths


def moto_function() -> Any:
    """moto's class of functions."""
    from moto.awslambda.models import LambdaFunction

    return LambdaFunction


def role_arn(endpoint: str | None = None) -> str:
    """A role that functions may run under, made in the mocked account, or in that of a server."""
    import boto3

    iam = boto3.client("iam", region_name=REGION, endpoint_url=endpoint)
    try:
        return str(iam.get_role(RoleName="prefect-slo-worker")["Role"]["Arn"])
    except iam.exceptions.NoSuchEntityException:
        made = iam.create_role(RoleName="prefect-slo-worker", AssumeRolePolicyDocument="{}", Path="/")
        return str(made["Role"]["Arn"])


def _region(request: Any) -> str:
    """The region that a request was signed for: the third field of its credential's scope."""
    scope = str(request.headers.get("Authorization", "")).partition("Credential=")[2].split("/")
    return scope[2] if len(scope) > 2 else REGION


def _handler(function: Any) -> str:
    """``module.function``: of an image what its configuration says, by default that of the worker."""
    if function.package_type != "Image":
        return str(function.handler)
    command = function.image_config.cmd
    return str(command[0]) if command else HANDLER


def _layer_zip(arn: str) -> bytes:
    """The content of a version of a layer, as moto keeps it."""
    from moto.awslambda.models import lambda_backends

    _, _, _, region, account, *_ = arn.split(":")
    kept: Any = lambda_backends[account][region].layers_versions_by_arn(arn)
    return bytes(kept.code_bytes)


def _extract(content: bytes, folder: Path) -> None:
    """Unpack a zip with the permissions of its files: those of a layer may be programs."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            written = Path(archive.extract(entry, folder))
            mode = entry.external_attr >> 16
            if mode and written.is_file():
                written.chmod(mode & 0o777)

"""Worker functions of an account: one per memory size, deployed, compared and removed.

A function's name holds a hash of its pool, code and settings, so a new version is another function beside the old one:
runs under way keep theirs, and nothing that is warm is thrown away. ``UpdateFunctionConfiguration`` is never called.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from prefect_slo.aws import limits
from prefect_slo.aws.clients import client
from prefect_slo.aws.concurrency import Allowed, allowed
from prefect_slo.aws.ownership import Owner, name_prefix
from prefect_slo.aws.packaging import HANDLER, content_hash, package_sha, worker_zip
from prefect_slo.aws.refusals import refused
from prefect_slo.errors import InvalidValue
from prefect_slo.units import whole

Architecture = Literal["x86_64", "arm64"]
State = Literal["deployed", "missing", "changed", "old"]
_CONTROL_S = 60.0

_SETTINGS = frozenset(
    {
        "InvalidParameterValueException",
        "ValidationException",
        "RequestEntityTooLargeException",
        "CodeStorageExceededException",
    }
)
"""Answers that speak of what was asked for, and not of who asks."""

_NOT_YET_ASSUMED = "cannot be assumed by Lambda"
ROLE_TRIES, ROLE_WAIT_S = 10, 3.0
"""A role that was just made is known everywhere some seconds later: Lambda refuses it until then."""


@dataclass(frozen=True)
class WorkerFunctions:
    """How worker functions are deployed.

    Attributes:
        prefix: Their names begin with it.
        pool: Name of the pool that they are of: no other has the same functions, nor removes them.
        role: ARN of the role that they run under; needed to deploy.
        timeout_s: Limit of one invocation.
        architecture: ``x86_64`` or ``arm64``.
        layers: ARNs of layers that bring the packages that tasks import.
        image: URI of a container image that brings them, in place of zip and layers; its handler is the worker's.
        storage_mb: Temporary disk.
        environment: Variables of the worker.
        reserved: Concurrency that is set aside for each function, and that it never exceeds.
        region: ``None`` as boto3 finds it.
        endpoint: ``None`` for AWS.

    Raises:
        InvalidValue: A setting that Lambda does not have.
    """

    prefix: str = "prefect-slo"
    pool: str = "lambda"
    role: str | None = None
    timeout_s: int = 900
    architecture: Architecture = "x86_64"
    layers: tuple[str, ...] = ()
    image: str | None = None
    storage_mb: int = 512
    environment: dict[str, str] = field(default_factory=dict)
    reserved: int | None = None
    region: str | None = None
    endpoint: str | None = None

    def __post_init__(self) -> None:
        name_prefix(self.prefix, "lambda.prefix")
        limits.timeout_s(self.timeout_s)
        limits.storage_mb(self.storage_mb)
        if self.architecture not in ("x86_64", "arm64"):
            raise InvalidValue("lambda.architecture", self.architecture, "'x86_64' or 'arm64'")
        object.__setattr__(self, "layers", tuple(self.layers))
        if len(self.layers) > limits.LAYERS:
            raise InvalidValue("lambda.layers", len(self.layers), f"at most {limits.LAYERS} layers")
        if self.image is not None and self.layers:
            raise InvalidValue("lambda.layers", self.layers, "none where an image brings the packages")
        if sum(len(name) + len(value) for name, value in self.environment.items()) > limits.ENVIRONMENT_BYTES:
            raise InvalidValue("lambda.environment", "...", f"at most {limits.ENVIRONMENT_BYTES} bytes in all")
        if self.reserved is not None:
            whole(self.reserved, "lambda.reserved")

    @property
    def version(self) -> str:
        """Names the code and the settings."""
        return content_hash(
            sys.version_info[:2], self.pool, self.timeout_s, self.architecture, self.layers, self.image,
            self.storage_mb, sorted(self.environment.items()), self.role,
        )  # fmt: skip

    @property
    def owner(self) -> Owner:
        """The pool, as what it makes is marked."""
        return Owner(self.prefix, self.pool)

    def name(self, memory_mb: int) -> str:
        """The function of a memory size."""
        return f"{self.prefix}-{self.version}-{memory_mb}"

    def deploy(self, memory_mb: Iterable[int], wait: Callable[[float], None] = time.sleep) -> list[str]:
        """Create the functions that there aren't, and wait until they can be called; returns their names.

        Args:
            memory_mb: Their memory sizes.
            wait: Waits for some seconds.

        Raises:
            InvalidValue: No role was given, or AWS refuses the settings.
            AwsRefused: AWS refuses for another reason, such as who asks.
        """
        if not self.role:
            raise InvalidValue(
                "lambda.role", self.role, "the ARN of a role for Lambda; 'prefect-slo aws policy' prints one's policy"
            )
        made = []
        for memory in memory_mb:
            name = self.name(limits.memory_mb(memory))
            if self._configuration(name) is None:
                self._create(name, memory, wait)
            self._lambda.get_waiter("function_active_v2").wait(
                FunctionName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 120}
            )
            if self.reserved is not None:
                self._lambda.put_function_concurrency(FunctionName=name, ReservedConcurrentExecutions=self.reserved)
            made.append(name)
        return made

    def allowed(self, memory_mb: Iterable[int], *, fresh: bool = False) -> Allowed:
        """What the account lets these functions have under way at once; asked for again after some minutes."""
        names = [self.name(memory) for memory in memory_mb]
        return allowed(self._lambda, self.region, self.endpoint, names, fresh=fresh)

    def status(self, memory_mb: Iterable[int]) -> list[FunctionStatus]:
        """Every worker function that the pool has made, and those of these sizes that are missing."""
        expected = {self.name(memory): memory for memory in memory_mb}
        found = {c["FunctionName"]: c for c in self._listed()}
        rows = []
        for name in sorted({*expected, *found}):
            if name not in found:
                rows.append(FunctionStatus(name, expected[name], "missing"))
                continue
            memory = int(found[name]["MemorySize"])
            state: State = (
                "old" if name not in expected else "deployed" if self._agrees(found[name], memory) else "changed"
            )
            rows.append(FunctionStatus(name, memory, state, found[name].get("LastModified", "")))
        return rows

    def destroy(self, *, only_old: bool = False, memory_mb: Iterable[int] = ()) -> list[str]:
        """Delete the functions that the pool has made, all or those of earlier versions; returns their names."""
        keep = {self.name(memory) for memory in memory_mb} if only_old else set()
        gone = [name for found in self._listed() if (name := found["FunctionName"]) not in keep]
        for name in gone:
            with suppress(self._lambda.exceptions.ResourceNotFoundException):  # somebody else was faster
                self._lambda.delete_function(FunctionName=name)
        return gone

    def _create(self, name: str, memory_mb: int, wait: Callable[[float], None]) -> None:
        code: dict[str, Any] = {
            "PackageType": "Zip",
            "Runtime": f"python{sys.version_info.major}.{sys.version_info.minor}",
            "Handler": HANDLER,
            "Code": {"ZipFile": worker_zip()},
            "Layers": list(self.layers),
        }
        if self.image is not None:
            code = {
                "PackageType": "Image",
                "Code": {"ImageUri": self.image},
                "ImageConfig": {"Command": [HANDLER]},
            }
        settings = {
            "FunctionName": name,
            "Role": self.role,
            "MemorySize": memory_mb,
            "Timeout": self.timeout_s,
            "Architectures": [self.architecture],
            "EphemeralStorage": {"Size": self.storage_mb},
            "Environment": {"Variables": dict(self.environment)},
            "Tags": self.owner.tags(self.version),
            **code,
        }
        for _ in range(ROLE_TRIES - 1):
            if self._created(settings, patient=True):
                return
            wait(ROLE_WAIT_S)
        self._created(settings, patient=False)

    def _created(self, settings: dict[str, Any], *, patient: bool) -> bool:
        """Whether it is there now; else its role is not known yet, where somebody is patient."""
        from botocore.exceptions import ClientError

        try:
            self._lambda.create_function(**settings)
        except ClientError as error:
            code, message = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
            if patient and _NOT_YET_ASSUMED in message:
                return False
            if code in _SETTINGS:
                name = settings["FunctionName"]
                raise InvalidValue("lambda.function", name, f"settings that AWS accepts ({error})") from error
            if code != "ResourceConflictException":  # somebody else was faster
                raise refused(error) from error
        return True

    def _agrees(self, found: dict[str, Any], memory_mb: int) -> bool:
        wanted = {
            "MemorySize": memory_mb,
            "Timeout": self.timeout_s,
            "Architectures": [self.architecture],
            "Role": self.role or found.get("Role"),
            "EphemeralStorage": {"Size": self.storage_mb},
        }
        if self.image is None:
            wanted["CodeSha256"] = package_sha()
        variables = found.get("Environment", {}).get("Variables", {})
        layers = tuple(layer["Arn"] for layer in found.get("Layers", ()))
        return (
            found["FunctionName"].endswith(f"-{memory_mb}")
            and variables == self.environment
            and layers == self.layers
            and all(found.get(name) == value for name, value in wanted.items())
        )

    def _configuration(self, name: str) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        try:
            found: dict[str, Any] = self._lambda.get_function_configuration(FunctionName=name)
        except ClientError as error:
            if error.response["Error"]["Code"] == "ResourceNotFoundException":
                return None
            raise refused(error) from error
        return found

    def _listed(self) -> list[dict[str, Any]]:
        pages = self._lambda.get_paginator("list_functions").paginate()
        every = (found for page in pages for found in page["Functions"])
        return [found for found in every if self._is_mine(found)]

    def _is_mine(self, found: dict[str, Any]) -> bool:
        if self.owner.version_in(found["FunctionName"], r"-\d+") is None:
            return False
        return self.owner.made(self._lambda.list_tags(Resource=found["FunctionArn"]).get("Tags"))

    @property
    def _lambda(self) -> Any:
        return client(
            "lambda", region=self.region, endpoint=self.endpoint, read_s=_CONTROL_S, connections=4, attempts=5
        )


@dataclass(frozen=True)
class FunctionStatus:
    """A worker function as the account has it.

    Attributes:
        name: Its name.
        memory_mb: Its memory.
        state: ``deployed``; ``missing``: deploy it; ``changed``: not as it was deployed, destroy and deploy it;
            ``old``: of another version or size, nothing here calls it.
        changed: When it was changed last.
    """

    name: str
    memory_mb: int
    state: State
    changed: str = ""

"""Job queues of AWS Batch with the machines behind them: made, looked at and removed with the pool that uses them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from prefect_slo.aws.clients import client
from prefect_slo.aws.ownership import Owner
from prefect_slo.aws.refusals import refused
from prefect_slo.errors import InvalidValue
from prefect_slo.units import items, text, whole

Kind = Literal["fargate", "fargate-spot", "ec2", "spot"]
KINDS: dict[str, str] = {"fargate": "FARGATE", "fargate-spot": "FARGATE_SPOT", "ec2": "EC2", "spot": "SPOT"}
WAIT_S, WAITS = 2.0, 150
_CONTROL_S = 60.0


@dataclass(frozen=True)
class BatchQueue:
    """A queue and its compute environment, both of one name.

    Attributes:
        name: Their name.
        kind: ``fargate`` and ``fargate-spot``: no machines to look after, no GPU; ``ec2`` and ``spot``: machines that
            Batch starts and ends.
        subnets: Where machines are.
        security_groups: What they may reach.
        max_vcpus: vCPUs at once, over all jobs.
        instance_types: For ``ec2`` and ``spot``, such as ``g4dn.xlarge`` for GPUs; Batch chooses by default.
        instance_role: Instance profile of machines, needed for ``ec2`` and ``spot``.
        service_role: ARN of the role of Batch itself; its service-linked role by default.
        region: ``None`` as boto3 finds it.
        endpoint: ``None`` for AWS.

    Raises:
        InvalidValue: A setting that Batch does not have.
    """

    name: str
    kind: Kind = "fargate"
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    max_vcpus: int = 256
    instance_types: tuple[str, ...] = ("optimal",)
    instance_role: str | None = None
    service_role: str | None = None
    region: str | None = None
    endpoint: str | None = None

    def __post_init__(self) -> None:
        text(self.name, "queue.name")
        if self.kind not in KINDS:
            raise InvalidValue("queue.kind", self.kind, f"one of {', '.join(KINDS)}")
        for name in ("subnets", "security_groups", "instance_types"):
            object.__setattr__(self, name, items(getattr(self, name), f"queue.{name}"))
        for name in ("subnets", "security_groups"):
            if not getattr(self, name):
                raise InvalidValue(f"queue.{name}", (), "at least one")
        whole(self.max_vcpus, "queue.max_vcpus")
        if not self.fargate and not self.instance_role:
            raise InvalidValue("queue.instance_role", None, f"an instance profile, which kind {self.kind!r} needs")

    @property
    def fargate(self) -> bool:
        """Whether there are no machines to look after."""
        return self.kind.startswith("fargate")

    def deploy(self, owner: Owner, wait: Callable[[float], None] = time.sleep) -> str:
        """Create the environment and the queue unless they are there, and wait until both can be used.

        Args:
            owner: The pool that they are marked as made by; what was there before stays somebody else's.
            wait: Waits for some seconds.

        Raises:
            InvalidValue: AWS refuses them, or finds them invalid.
            AwsRefused: AWS refuses for another reason, such as who asks.
        """
        if not self._environment():
            self._create_environment(owner)
        self._valid(self._environment, wait)
        if not self._queue():
            order = [{"order": 1, "computeEnvironment": self._environment()["computeEnvironmentArn"]}]
            self._batch.create_job_queue(
                jobQueueName=self.name,
                state="ENABLED",
                priority=1,
                computeEnvironmentOrder=order,
                tags=owner.tags(self.name),
            )
        self._valid(self._queue, wait)
        return self.name

    def state(self) -> Literal["deployed", "missing", "changed"]:
        """How the account has them: ``changed`` where one is disabled, invalid or of another kind."""
        environment, queue = self._environment(), self._queue()
        if not environment or not queue:
            return "missing"
        same = environment.get("computeResources", {}).get("type", KINDS[self.kind]) == KINDS[self.kind]
        usable = all(
            found.get("state") == "ENABLED" and found.get("status") in (None, "VALID") for found in (environment, queue)
        )
        return "deployed" if same and usable else "changed"

    def destroy(self, owner: Owner, wait: Callable[[float], None] = time.sleep) -> list[str]:
        """Remove the queue and the environment, in this order, as Batch asks for, where the pool has made them.

        Returns:
            Their name, where there was something to remove.
        """
        gone = []
        if owner.made(self._queue().get("tags")):
            self._batch.update_job_queue(jobQueue=self.name, state="DISABLED")
            self._valid(self._queue, wait)
            self._batch.delete_job_queue(jobQueue=self.name)
            self._gone(self._queue, wait)
            gone.append(self.name)
        if owner.made(self._environment().get("tags")):
            self._batch.update_compute_environment(computeEnvironment=self.name, state="DISABLED")
            self._valid(self._environment, wait)
            self._batch.delete_compute_environment(computeEnvironment=self.name)
            gone = gone or [self.name]
        return gone

    def _create_environment(self, owner: Owner) -> None:
        from botocore.exceptions import ClientError

        resources: dict[str, Any] = {
            "type": KINDS[self.kind],
            "maxvCpus": self.max_vcpus,
            "subnets": list(self.subnets),
            "securityGroupIds": list(self.security_groups),
        }
        if not self.fargate:
            best = "SPOT_CAPACITY_OPTIMIZED" if self.kind == "spot" else "BEST_FIT_PROGRESSIVE"
            resources.update(
                minvCpus=0,
                instanceTypes=list(self.instance_types),
                instanceRole=self.instance_role,
                allocationStrategy=best,
            )
        role = {"serviceRole": self.service_role} if self.service_role else {}
        try:
            self._batch.create_compute_environment(
                computeEnvironmentName=self.name,
                type="MANAGED",
                state="ENABLED",
                computeResources=resources,
                tags=owner.tags(self.name),
                **role,
            )
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("ClientException", "ValidationException"):
                raise refused(error) from error
            raise InvalidValue("queue", self.name, f"settings that AWS accepts ({error})") from error

    def _valid(self, look: Callable[[], dict[str, Any]], wait: Callable[[float], None]) -> None:
        for _ in range(WAITS):
            found = look()
            if found.get("status") in (None, "VALID"):
                return
            if found["status"] == "INVALID":
                raise InvalidValue("queue", self.name, f"settings that AWS can use ({found.get('statusReason', '')})")
            wait(WAIT_S)
        raise InvalidValue("queue", self.name, f"to be ready within {WAIT_S * WAITS:.0f} s; look at it in the console")

    def _gone(self, look: Callable[[], dict[str, Any]], wait: Callable[[float], None]) -> None:
        for _ in range(WAITS):
            if look().get("status") in (None, "DELETED"):
                return
            wait(WAIT_S)

    def _environment(self) -> dict[str, Any]:
        found = self._batch.describe_compute_environments(computeEnvironments=[self.name])["computeEnvironments"]
        return next((one for one in found if one.get("status") != "DELETED"), {})

    def _queue(self) -> dict[str, Any]:
        found = self._batch.describe_job_queues(jobQueues=[self.name])["jobQueues"]
        return next((one for one in found if one.get("status") != "DELETED"), {})

    @property
    def _batch(self) -> Any:
        return client("batch", region=self.region, endpoint=self.endpoint, read_s=_CONTROL_S, connections=8, attempts=5)

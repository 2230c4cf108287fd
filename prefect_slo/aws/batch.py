"""AWS Batch: how jobs run the same events for the same worker; the event and the reply lie on S3."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from prefect_slo.aws.clients import client
from prefect_slo.aws.functions import FunctionStatus, State
from prefect_slo.aws.ownership import Owner, name_prefix
from prefect_slo.aws.packaging import content_hash
from prefect_slo.aws.permissions import Statements, allow
from prefect_slo.aws.queues import BatchQueue
from prefect_slo.errors import InvalidValue
from prefect_slo.pricing import price_list
from prefect_slo.units import finite, positive, text, whole

FARGATE: dict[float, tuple[int, int, int]] = {
    0.25: (512, 2048, 512),
    0.5: (1024, 4096, 1024),
    1: (2048, 8192, 1024),
    2: (4096, 16_384, 1024),
    4: (8192, 30_720, 1024),
    8: (16_384, 61_440, 4096),
    16: (32_768, 122_880, 8192),
}
"""Least and most MB of memory beside so many vCPUs, and its steps; 0.25 vCPU have 512, 1024 or 2048."""

ON_LOST_MACHINES = [
    {"onStatusReason": "Host EC2*", "action": "RETRY"},
    {"onStatusReason": "Your Spot Task was interrupted*", "action": "RETRY"},
    {"onReason": "*", "action": "EXIT"},
]
"""Start a job again whose machine was taken away, and no other."""

COMMAND = ("python", "-m", "prefect_slo.worker", "Ref::event")
LOG_GROUP = "/aws/batch/job"
_CONTROL_S = 60.0


@dataclass(frozen=True)
class BatchJobs:
    """How jobs are run.

    Attributes:
        queue: Name or ARN of the job queue, whose compute environment says which machines, on-demand or spot; or a
            ``BatchQueue``, which is deployed and destroyed with the jobs.
        image: Container image with this package and what tasks import.
        vcpus: vCPUs of a job.
        memory_mb: Memory of a job.
        gpu: GPUs of a job; whole ones, on EC2.
        timeout_s: Limit of one attempt, at least 60.
        attempts: How often Batch starts a job at most, e.g. after a spot machine was taken away.
        only_lost: Whether only a job that lost its machine is started again, and not one that failed by itself.
        fargate: Whether the queue is one of Fargate; the execution role is needed then.
        job_role: ARN of the role that the worker has.
        execution_role: ARN of the role that starts the container.
        launch_s: Wait until a job starts, until it has been seen.
        least_s: What an attempt is billed at least: AWS bills a minute of a machine or a task that is started.
        gather_s: Jobs that are asked for within so many seconds become one array job; 0 for none.
        prices: Price list of its vCPUs, memory and GPUs.
        prefix: Names of job definitions begin with it.
        pool: Name of the pool that they are of, which sets it: no other has the same definitions, nor removes them.
        region: ``None`` as boto3 finds it.
        endpoint: ``None`` for AWS.
        poll_s: Least and most seconds between two looks.

    Raises:
        InvalidValue: A setting that Batch does not have.
    """

    queue: str | BatchQueue
    image: str
    vcpus: float = 1.0
    memory_mb: int = 4096
    gpu: int = 0
    timeout_s: int = 14_400
    attempts: int = 1
    only_lost: bool = False
    fargate: bool = False
    job_role: str | None = None
    execution_role: str | None = None
    launch_s: float = 90.0
    least_s: float = 60.0
    gather_s: float = 0.25
    prices: str = "aws-fargate-x86"
    prefix: str = "prefect-slo"
    pool: str = ""
    region: str | None = None
    endpoint: str | None = None
    poll_s: tuple[float, float] = (1.0, 15.0)

    def __post_init__(self) -> None:
        if isinstance(self.queue, BatchQueue):
            object.__setattr__(self, "fargate", self.queue.fargate)
        else:
            text(self.queue, "batch.queue")
        text(self.image, "batch.image")
        name_prefix(self.prefix, "batch.prefix")
        positive(self.vcpus, "batch.vcpus")
        positive(self.launch_s, "batch.launch_s")
        for name in ("least_s", "gather_s"):
            if finite(getattr(self, name), f"batch.{name}") < 0:
                raise InvalidValue(f"batch.{name}", getattr(self, name), "0 or more")
        for name, least, most in (
            ("memory_mb", 4, 10**8),
            ("gpu", 0, 64),
            ("timeout_s", 60, 10**7),
            ("attempts", 1, 10),
        ):
            if not least <= whole(getattr(self, name), f"batch.{name}", least=0) <= most:
                raise InvalidValue(f"batch.{name}", getattr(self, name), f"{least} to {most}")
        if self.fargate and self.gpu:
            raise InvalidValue("batch.gpu", self.gpu, "0 on Fargate, which has none")
        if self.fargate and not self.execution_role:
            raise InvalidValue("batch.execution_role", None, "the ARN of a role, which Fargate needs")
        if self.fargate:
            self._check_fargate()
        price_list(self.prices)

    def _check_fargate(self) -> None:
        """Fargate has vCPUs and memory in pairs alone."""
        least, most, step = FARGATE.get(self.vcpus, (0, 0, 1))
        if not most:
            raise InvalidValue("batch.vcpus", self.vcpus, f"one of {', '.join(f'{v:g}' for v in FARGATE)} on Fargate")
        if not least <= self.memory_mb <= most or (self.memory_mb - least) % step:
            expected = f"{least} to {most} MB in steps of {step} beside {self.vcpus:g} vCPU on Fargate"
            raise InvalidValue("batch.memory_mb", self.memory_mb, expected)

    def near(self, region: str | None, endpoint: str | None) -> BatchJobs:
        """The same jobs, and a queue of ours, asked for as a pool asks, unless they have a region or an endpoint."""
        region, endpoint, queue = self.region or region, self.endpoint or endpoint, self.queue
        if isinstance(queue, BatchQueue):
            queue = replace(queue, region=queue.region or region, endpoint=queue.endpoint or endpoint)
        return replace(self, queue=queue, region=region, endpoint=endpoint)

    @property
    def queue_name(self) -> str:
        """Name or ARN of the queue."""
        return self.queue.name if isinstance(self.queue, BatchQueue) else self.queue

    @property
    def definition(self) -> str:
        """Name of the job definition: it holds a hash of the settings, so a change makes another."""
        settings = (
            self.image, self.vcpus, self.memory_mb, self.gpu, self.timeout_s, self.attempts, self.fargate,
            self.job_role, self.execution_role, self.only_lost, self.pool,
        )  # fmt: skip
        return f"{self.prefix}-{content_hash(settings)}"

    @property
    def owner(self) -> Owner:
        """The pool, as what it makes is marked."""
        return Owner(self.prefix, self.pool)

    def deploy(self) -> str:
        """Register the job definition unless it is there, and make the queue where it is ours; returns its name."""
        if isinstance(self.queue, BatchQueue):
            self.queue.deploy(self.owner)
        found = self.batch.describe_job_definitions(jobDefinitionName=self.definition, status="ACTIVE")
        if found["jobDefinitions"]:
            return self.definition
        needs = [
            {"type": "VCPU", "value": f"{self.vcpus:g}"},
            {"type": "MEMORY", "value": str(self.memory_mb)},
            *([{"type": "GPU", "value": str(self.gpu)}] if self.gpu else []),
        ]
        container: dict[str, Any] = {"image": self.image, "command": list(COMMAND), "resourceRequirements": needs}
        if self.job_role:
            container["jobRoleArn"] = self.job_role
        if self.execution_role:
            container["executionRoleArn"] = self.execution_role
        if self.fargate:
            container["networkConfiguration"] = {"assignPublicIp": "ENABLED"}
        retry: dict[str, Any] = {"attempts": self.attempts}
        if self.only_lost:
            retry["evaluateOnExit"] = ON_LOST_MACHINES
        self.batch.register_job_definition(
            jobDefinitionName=self.definition,
            type="container",
            platformCapabilities=["FARGATE" if self.fargate else "EC2"],
            parameters={"event": ""},
            containerProperties=container,
            retryStrategy=retry,
            timeout={"attemptDurationSeconds": self.timeout_s},
            tags=self.owner.tags(self.definition),
        )
        return self.definition

    def status(self) -> list[FunctionStatus]:
        """Every job definition that the pool has made, this one where it is missing, and the queue."""
        found = {one["jobDefinitionName"]: _memory_mb(one) for one in self._definitions()}
        rows = [
            FunctionStatus(name, memory_mb, "deployed" if name == self.definition else "old")
            for name, memory_mb in sorted(found.items())
        ]
        if self.definition not in found:
            rows.append(FunctionStatus(self.definition, self.memory_mb, "missing"))
        rows.append(FunctionStatus(self.queue_name, 0, self._queue_state()))
        return rows

    def destroy(self, *, only_old: bool = False) -> list[str]:
        """Deregister what the pool has made: job definitions, all or those of earlier settings, and a queue of ours.

        Returns:
            The names of what is gone.
        """
        gone = []
        for found in self._definitions():
            if only_old and found["jobDefinitionName"] == self.definition:
                continue
            self.batch.deregister_job_definition(jobDefinition=found["jobDefinitionArn"])
            gone.append(found["jobDefinitionName"])
        queues = self.queue.destroy(self.owner) if isinstance(self.queue, BatchQueue) and not only_old else []
        return sorted(set(gone)) + queues

    def policy(self) -> Statements:
        """What callers and deployers need beside S3, as statements of IAM policies by who needs them."""
        region = self.region or "*"
        definition = f"arn:aws:batch:{region}:*:job-definition/{self.prefix}-*"
        queue = (
            self.queue_name
            if self.queue_name.startswith("arn:")
            else f"arn:aws:batch:{region}:*:job-queue/{self.queue_name}"
        )
        roles = [role for role in (self.job_role, self.execution_role) if role]
        caller = [
            allow(["batch:SubmitJob"], [definition, queue]),
            allow(["batch:TerminateJob"], f"arn:aws:batch:{region}:*:job/*"),
            allow(["batch:DescribeJobs", "batch:ListJobs"], "*"),
            allow(["logs:GetLogEvents"], f"arn:aws:logs:{region}:*:log-group:{LOG_GROUP}:*"),
        ]
        deployer = [
            allow(["batch:RegisterJobDefinition", "batch:DeregisterJobDefinition", "batch:TagResource"], definition),
            allow(["batch:DescribeJobDefinitions", "batch:DescribeJobQueues"], "*"),
            *([allow(["iam:PassRole"], roles)] if roles else []),
        ]
        if isinstance(self.queue, BatchQueue):
            made = [queue, f"arn:aws:batch:{region}:*:compute-environment/{self.queue_name}"]
            kinds = ("ComputeEnvironment", "JobQueue")
            actions = [f"batch:{verb}{kind}" for verb in ("Create", "Update", "Delete") for kind in kinds]
            deployer.append(allow([*actions, "batch:TagResource"], made))
            deployer.append(allow(["batch:DescribeComputeEnvironments"], "*"))
        return {"caller": caller, "deployer": deployer}

    def _definitions(self) -> list[dict[str, Any]]:
        pages = self.batch.get_paginator("describe_job_definitions").paginate(status="ACTIVE")
        every = (definition for page in pages for definition in page["jobDefinitions"])
        return [found for found in every if self._is_mine(found)]

    def _is_mine(self, found: dict[str, Any]) -> bool:
        return self.owner.version_in(found["jobDefinitionName"]) is not None and self.owner.made(found.get("tags"))

    def _queue_state(self) -> State:
        if isinstance(self.queue, BatchQueue):
            return self.queue.state()
        found = self.batch.describe_job_queues(jobQueues=[self.queue])["jobQueues"]
        if not found:
            return "missing"
        return "deployed" if found[0]["state"] == "ENABLED" else "changed"

    @property
    def usd_s(self) -> float:
        """What a job costs a second."""
        return price_list(self.prices).rate(self.vcpus, self.memory_mb, float(self.gpu))

    @property
    def batch(self) -> Any:
        """A client of Batch."""
        return client("batch", region=self.region, endpoint=self.endpoint, read_s=_CONTROL_S, connections=8, attempts=5)

    @property
    def submitting(self) -> Any:
        """A client of Batch that asks once: a job whose submission had no reply may be there."""
        return client("batch", region=self.region, endpoint=self.endpoint, read_s=_CONTROL_S, connections=8)

    @property
    def logs(self) -> Any:
        """A client of CloudWatch's logs."""
        return client("logs", region=self.region, endpoint=self.endpoint, read_s=_CONTROL_S, connections=4, attempts=3)


def _memory_mb(definition: dict[str, Any]) -> int:
    needs = definition.get("containerProperties", {}).get("resourceRequirements", [])
    return int(next((need["value"] for need in needs if need["type"] == "MEMORY"), 0))

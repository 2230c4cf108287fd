"""AWS Batch: the same events for the same worker, as jobs; the event and the reply lie on S3.

Jobs are looked at together, a hundred to a request, at intervals that grow while nothing happens.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from prefect_slo.aws.clients import client
from prefect_slo.aws.invoke import Answer, Failed, Why
from prefect_slo.aws.packaging import content_hash
from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.errors import InvalidValue
from prefect_slo.pricing import price_list
from prefect_slo.units import positive, text, whole

COMMAND = ("python", "-m", "prefect_slo.worker", "Ref::event")
LOG_LINES = 20
LOG_GROUP = "/aws/batch/job"
_DESCRIBED = 100
_ENDED = ("SUCCEEDED", "FAILED")
_CONTROL_S = 60.0
_JOB_NAME = 128


@dataclass(frozen=True)
class BatchJobs:
    """How jobs are run.

    Attributes:
        queue: Name or ARN of the job queue; its compute environment says which machines, on-demand or spot.
        image: Container image with this package and what tasks import.
        vcpus: vCPUs of a job.
        memory_mb: Memory of a job.
        gpu: GPUs of a job; whole ones, on EC2.
        timeout_s: Limit of one attempt, at least 60.
        attempts: How often Batch starts a job at most, e.g. after a spot machine was taken away.
        fargate: Whether the queue is one of Fargate; the execution role is needed then.
        job_role: ARN of the role that the worker has.
        execution_role: ARN of the role that starts the container.
        launch_s: Wait until a job starts, until it has been seen.
        prices: Price list of its vCPUs, memory and GPUs.
        prefix: Names of job definitions begin with it.
        region: ``None`` as boto3 finds it.
        endpoint: ``None`` for AWS.
        poll_s: Least and most seconds between two looks.

    Raises:
        InvalidValue: A setting that Batch does not have.
    """

    queue: str
    image: str
    vcpus: float = 1.0
    memory_mb: int = 4096
    gpu: int = 0
    timeout_s: int = 14_400
    attempts: int = 1
    fargate: bool = False
    job_role: str | None = None
    execution_role: str | None = None
    launch_s: float = 90.0
    prices: str = "aws-fargate-x86"
    prefix: str = "prefect-slo"
    region: str | None = None
    endpoint: str | None = None
    poll_s: tuple[float, float] = (1.0, 15.0)

    def __post_init__(self) -> None:
        text(self.queue, "batch.queue")
        text(self.image, "batch.image")
        positive(self.vcpus, "batch.vcpus")
        positive(self.launch_s, "batch.launch_s")
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
        price_list(self.prices)

    @property
    def definition(self) -> str:
        """Name of the job definition: it holds a hash of the settings, so a change makes another."""
        settings = (
            self.image, self.vcpus, self.memory_mb, self.gpu, self.timeout_s, self.attempts, self.fargate,
            self.job_role, self.execution_role,
        )  # fmt: skip
        return f"{self.prefix}-{content_hash(settings)}"

    def deploy(self) -> str:
        """Register the job definition unless it is there; returns its name."""
        found = self._batch.describe_job_definitions(jobDefinitionName=self.definition, status="ACTIVE")
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
        self._batch.register_job_definition(
            jobDefinitionName=self.definition,
            type="container",
            platformCapabilities=["FARGATE" if self.fargate else "EC2"],
            parameters={"event": ""},
            containerProperties=container,
            retryStrategy={"attempts": self.attempts},
            timeout={"attemptDurationSeconds": self.timeout_s},
        )
        return self.definition

    def destroy(self) -> list[str]:
        """Deregister every job definition under the prefix; returns their names."""
        gone = []
        pages = self._batch.get_paginator("describe_job_definitions").paginate(status="ACTIVE")
        for found in (definition for page in pages for definition in page["jobDefinitions"]):
            if found["jobDefinitionName"].startswith(f"{self.prefix}-"):
                self._batch.deregister_job_definition(jobDefinition=found["jobDefinitionArn"])
                gone.append(found["jobDefinitionName"])
        return sorted(set(gone))

    @property
    def usd_s(self) -> float:
        """What a job costs a second."""
        return price_list(self.prices).rate(self.vcpus, self.memory_mb, float(self.gpu))

    @property
    def _batch(self) -> Any:
        return client("batch", region=self.region, endpoint=self.endpoint, read_s=_CONTROL_S, connections=8, attempts=5)

    @property
    def _logs(self) -> Any:
        return client("logs", region=self.region, endpoint=self.endpoint, read_s=_CONTROL_S, connections=4, attempts=3)


@dataclass
class BatchInvoker:
    """Runs events as jobs, as an ``Invoker`` runs them as invocations.

    Args:
        jobs: How they are run.
        store: Where events and replies lie.
    """

    jobs: BatchJobs
    store: S3Prefix
    clock: Callable[[], float] = time.monotonic
    _watch: _Watch = field(init=False)

    def __post_init__(self) -> None:
        self._watch = _Watch(self.jobs._batch, *self.jobs.poll_s)

    def call(self, function: str, event: dict[str, Any], *, again: bool, cancelled: threading.Event) -> Answer:
        """Have a job run an event; ``function`` and ``again`` say nothing here.

        Raises:
            Failed: It gave no result; its message has the end of its log.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        where = event["out"]["key"]
        sent = self.clock()
        try:
            self.store.put(f"{where}/event", json.dumps(event).encode())
            name = f"{self.jobs.prefix}-{where.rpartition('/runs/')[2]}".replace("/", "-")[:_JOB_NAME]
            submitted = self.jobs._batch.submit_job(
                jobName=name,
                jobQueue=self.jobs.queue,
                jobDefinition=self.jobs.definition,
                parameters={"event": f"s3://{self.store.bucket}/{where}/event"},
            )
        except (ClientError, BotoCoreError) as error:
            detail = f"no job could be submitted ({error}). Deploy with 'prefect-slo aws deploy'"
            raise Failed("start", detail) from None
        job = self._watch.ended(submitted["jobId"], cancelled)
        if job is None:
            self.jobs._batch.terminate_job(jobId=submitted["jobId"], reason="cancelled")
            raise Failed("cancelled", "cancelled while its job was under way")
        billed = self._bill(job)
        if job["status"] == "FAILED":
            raise self._failed(job, billed)
        reply = json.loads(self.store.get(f"{where}/reply"))
        return Answer(reply, sent, self.clock(), self._waited(job), None, billed)

    def _bill(self, job: dict[str, Any]) -> Decimal:
        """Time of every attempt at the price list; Batch itself costs nothing."""
        attempts = job.get("attempts") or [job]
        ran_ms = sum(max(int(one.get("stoppedAt", 0)) - int(one.get("startedAt", 0)), 0) for one in attempts)
        return Decimal(ran_ms) / 1000 * Decimal(repr(self.jobs.usd_s))

    @staticmethod
    def _waited(job: dict[str, Any]) -> float:
        return max(int(job.get("startedAt", 0)) - int(job.get("createdAt", 0)), 0) / 1000

    def _failed(self, job: dict[str, Any], billed: Decimal) -> Failed:
        attempt: dict[str, Any] = (job.get("attempts") or [{}])[-1]
        container = {**job.get("container", {}), **attempt.get("container", {})}
        reason = (
            f"{job.get('statusReason', '')} {attempt.get('statusReason', '')} {container.get('reason', '')}".strip()
        )
        why: Why = "died"
        if "OutOfMemory" in reason:
            why = "memory"
        elif "timeout" in reason.lower():
            why = "timeout"
        exit_code = container.get("exitCode")
        ended = f"exit code {exit_code}" if exit_code is not None else "no exit code"
        detail = f"job {job['jobId']} failed ({reason or 'no reason'}, {ended}){self._log_tail(container)}"
        return Failed(why, detail, memory_mb=float(self.jobs.memory_mb), billed=billed)

    def _log_tail(self, container: dict[str, Any]) -> str:
        from botocore.exceptions import BotoCoreError, ClientError

        stream = container.get("logStreamName")
        if not stream:
            return ""
        try:
            events = self.jobs._logs.get_log_events(
                logGroupName=LOG_GROUP, logStreamName=stream, limit=LOG_LINES, startFromHead=False
            )["events"]
        except (ClientError, BotoCoreError) as error:
            return f"; its log cannot be read ({error})"
        return "; the end of its log:\n" + "\n".join(event["message"] for event in events) if events else ""


class _Watch:
    """One thread that looks at every job that somebody waits for."""

    def __init__(self, batch: Any, least_s: float, most_s: float) -> None:
        self._batch, self._least_s, self._most_s = batch, least_s, most_s
        self._news = threading.Condition()
        self._waiting: set[str] = set()
        self._jobs: dict[str, dict[str, Any]] = {}
        self._broken: Exception | None = None
        self._thread: threading.Thread | None = None
        self._fresh = threading.Event()

    def ended(self, job: str, cancelled: threading.Event) -> dict[str, Any] | None:
        """What a job was when it ended; ``None`` where nobody wants it any more."""
        with self._news:
            self._waiting.add(job)
            self._fresh.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="prefect-slo-batch", daemon=True)
                self._thread.start()
            while job not in self._jobs:
                if cancelled.is_set() or self._broken is not None:
                    self._waiting.discard(job)
                    if self._broken is not None:
                        raise Failed("unknown", f"its job cannot be looked at ({self._broken})")
                    return None
                self._news.wait(0.5)
            return self._jobs.pop(job)

    def _look(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        pause_s = self._least_s
        while True:
            with self._news:
                ids = sorted(self._waiting)
                if not ids:
                    self._thread = None
                    return
            try:
                pages = [
                    self._batch.describe_jobs(jobs=ids[at : at + _DESCRIBED])["jobs"]
                    for at in range(0, len(ids), _DESCRIBED)
                ]
            except (ClientError, BotoCoreError) as error:  # boto3 has tried several times
                with self._news:
                    self._broken, self._thread = error, None
                    self._news.notify_all()
                return
            done = {job["jobId"]: job for page in pages for job in page if job["status"] in _ENDED}
            with self._news:
                self._jobs.update({job: found for job, found in done.items() if job in self._waiting})
                self._waiting -= set(done)
                self._news.notify_all()
            pause_s = self._least_s if done or self._fresh.is_set() else min(1.5 * pause_s, self._most_s)
            self._fresh.clear()
            time.sleep(self._least_s)
            self._fresh.wait(pause_s - self._least_s)

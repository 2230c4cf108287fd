"""AWS Batch on this machine: moto keeps queues and definitions, and jobs really run, as processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prefect_slo.testing.aws.guard import FAKE, WALL

POLL_S = 0.02
OUT_OF_MEMORY = "OutOfMemoryError: Container killed due to memory usage"
RECLAIMED = "Host EC2 (instance i-0123456789abcdef0) terminated."
TIMED_OUT = "Job attempt duration exceeded timeout"


class LocalBatch:
    """Runs the jobs that moto keeps; their commands' ``python`` is this one.

    Args:
        endpoint: Address of a server that stands for AWS, for the jobs' own calls.
        gpus: GPUs that there are; jobs that ask for more than are free wait.
        launch_s: Wait before every start.
        images: Folders that stand for container images, by name: their ``bin`` is on the path of a job. Jobs of other
            images see this machine's programs alone.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        gpus: int = 0,
        launch_s: float = 0.0,
        images: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        self.endpoint, self.launch_s, self._images = endpoint, launch_s, dict(images)
        self.ended: list[str] = []
        self.visible: dict[str, str] = {}
        self.most_gpus = 0
        self._free = set(range(gpus))
        self._total = gpus
        self._room = threading.Condition()
        self._original: Any = None
        self.states: Counter[str] = Counter()
        self._running: set[str] = set()
        self._reclaimed: set[str] = set()
        self._processes: set[subprocess.Popen[str]] = set()
        self._closed = False

    def __enter__(self) -> LocalBatch:
        batch, kept = self, _moto_job()

        def run(job: Any) -> None:
            batch._run(job)

        self._original, kept.run = kept.run, run
        return self

    def __exit__(self, *_: object) -> None:
        _moto_job().run = self._original
        with self._room:
            self._closed = True
            for process in self._processes:
                _end(process)
            self._room.notify_all()

    @property
    def gpus(self) -> int:
        """GPUs that jobs may have together; what is set later counts for jobs that start from then on."""
        return self._total

    @gpus.setter
    def gpus(self, number: int) -> None:
        with self._room:
            self._free |= set(range(self._total, number))
            self._free -= set(range(number, self._total))
            self._total = number
            self._room.notify_all()

    def reclaim(self) -> int:
        """Take the machines of all running jobs away, as AWS takes back a spot machine; returns how many jobs ran."""
        with self._room:
            self._reclaimed |= self._running
            return len(self._running)

    def queue(self, name: str = "jobs") -> str:
        """A job queue in the mocked account, with a compute environment of its own; returns its name."""
        import boto3

        iam, batch = boto3.client("iam"), boto3.client("batch")
        role = iam.create_role(RoleName=f"{name}-service", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
        made = batch.create_compute_environment(
            computeEnvironmentName=f"{name}-environment", type="UNMANAGED", state="ENABLED", serviceRole=role
        )
        environments = [{"order": 1, "computeEnvironment": made["computeEnvironmentArn"]}]
        batch.create_job_queue(jobQueueName=name, state="ENABLED", priority=1, computeEnvironmentOrder=environments)
        return name

    # ---- a job ------------------------------------------------------------------------------------------------------

    def _run(self, job: Any) -> None:
        job.status = "RUNNABLE"
        devices = self._take(job, int(float(job.job_definition._get_resource_requirement("gpu", 0) or 0)))
        try:
            if devices is not None:
                self._attempts(job, devices)
            else:
                job._mark_stopped(success=False)
        finally:
            with self._room:
                self._free |= {device for device in devices or () if device < self._total}
                self._room.notify_all()
            self.states[job.status] += 1
            self._end_array(job)

    def _end_array(self, job: Any) -> None:
        """An array has ended with the last of its jobs; it fails where one of them has."""
        parent = _parent(job)
        with self._room:
            while parent is not None and parent._child_jobs is None and not self._closed:
                self._room.wait(POLL_S)  # moto tells an array of its jobs once all have started
            children = parent._child_jobs if parent is not None else None
            if children and not parent.job_stopped and all(child.job_stopped for child in children):
                parent._mark_stopped(success=all(child.status == "SUCCEEDED" for child in children))

    def _take(self, job: Any, wanted: int) -> list[int] | None:
        """GPUs for a job, once there are enough; ``None`` where there never will be, or it is cancelled."""
        with self._room:
            while len(self._free) < wanted:
                if wanted > self._total or _stopped(job) or self._closed:
                    job.job_stopped_reason = job.job_stopped_reason or "no machine of the queue has so many GPUs"
                    return None
                self._room.wait(POLL_S)
            taken = sorted(self._free)[:wanted]
            self._free -= set(taken)
            self.most_gpus = max(self.most_gpus, self._total - len(self._free))
            return taken

    def _attempts(self, job: Any, devices: list[int]) -> None:
        strategy = job.job_definition.retry_strategy or {}
        strategy = strategy if isinstance(strategy, dict) else {"attempts": strategy}
        for number in range(1, int(strategy.get("attempts", 1)) + 1):
            job.status = "STARTING"
            time.sleep(self.launch_s)
            job.job_started_at, job.log_stream_name = datetime.now(), job._stream_name
            job._start_attempt()
            job.status = "RUNNING"
            with self._room:
                self._running.add(job.job_id)
            code, reason, log = self._process(job, devices, number)
            with self._room:
                self._running.discard(job.job_id)
            self._keep_log(job, log)
            job.exit_code = code
            job.latest_attempt["container"].update({"exitCode": code, **({"reason": reason} if reason else {})})
            job.latest_attempt["stoppedAt"] = int(1000 * time.time())
            if code == 0 and not _stopped(job):
                job._mark_stopped(success=True)
                return
            with self._room:
                lost = job.job_id in self._reclaimed
                self._reclaimed.discard(job.job_id)
            status = RECLAIMED if lost else reason or "Essential container in task exited"
            job.latest_attempt["statusReason"] = status
            if not job.stop:
                job.job_stopped_reason = status
            if job.stop or self._closed or reason == TIMED_OUT or not _again(strategy, code, reason, status):
                break
        job._mark_stopped(success=False)

    def _process(self, job: Any, devices: list[int], number: int) -> tuple[int, str, str]:
        command = job._add_parameters_to_command(list(job._get_container_property("command", [])))
        command = [sys.executable if part == "python" else part for part in command]
        own = {entry["name"]: entry["value"] for entry in job._get_container_property("environment", [])}
        visible = ",".join(map(str, devices))
        self.visible[job.job_id] = visible
        environment = {
            "PATH": os.pathsep.join([*self._programs(job), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": str(WALL),
            **FAKE,
            "AWS_ENDPOINT_URL": self.endpoint,
            "CUDA_VISIBLE_DEVICES": visible,
            "AWS_BATCH_JOB_ATTEMPT": str(number),
            **({"AWS_BATCH_JOB_ARRAY_INDEX": str(job.array_properties["index"])} if _parent(job) else {}),
            **own,
        }
        limit_mb = float(job._get_container_property("memory", 0) or 0)
        limit_s = job._get_attempt_duration()
        with self._room:
            if self._closed:
                return 128 + signal.SIGKILL, "", ""
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True, text=True,
            )  # fmt: skip
            self._processes.add(process)
        written: list[str] = []
        reader = threading.Thread(target=lambda: written.extend(process.stdout or ()), daemon=True)
        reader.start()
        begun, reason = time.monotonic(), ""
        while process.poll() is None:
            if limit_mb and _resident_mb(process.pid) > limit_mb:
                reason = OUT_OF_MEMORY
            elif limit_s and time.monotonic() - begun > limit_s:
                reason = TIMED_OUT
            elif not _stopped(job) and job.job_id not in self._reclaimed:
                time.sleep(POLL_S)
                continue
            _end(process)
        with self._room:
            self._processes.discard(process)
        reader.join(timeout=5)
        code = process.returncode
        return (128 - code if code < 0 else code), reason, "".join(written)

    def _programs(self, job: Any) -> list[str]:
        image = self._images.get(job._get_container_property("image", ""))
        return [str(Path(image).resolve() / "bin")] if image is not None else []

    def _keep_log(self, job: Any, log: str) -> None:
        now = int(1000 * time.time())
        lines = [{"timestamp": now, "message": line} for line in log.splitlines() if line.strip()]
        logs = job._log_backend
        logs.ensure_log_group(job._log_group)
        logs.ensure_log_stream(job._log_group, job.log_stream_name)
        if lines:
            logs.put_log_events(job._log_group, job.log_stream_name, lines)


def _end(process: subprocess.Popen[str]) -> None:
    """End a job's process, where it has not ended, and everything that it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _parent(job: Any) -> Any:
    """The array that a job is one of; ``None`` for a job of its own."""
    array, _, index = job.job_id.rpartition(":")
    return job.all_jobs.get(array) if array and index.isdigit() else None


def _stopped(job: Any) -> bool:
    """Whether a job, or the array that it is one of, was terminated."""
    parent = _parent(job)
    return bool(job.stop or (parent is not None and parent.stop))


def _again(strategy: Mapping[str, Any], code: int, reason: str, status: str) -> bool:
    """Whether Batch starts a job again that ended so: by the first of the strategy's rules that applies, else yes."""
    for rule in strategy.get("evaluateOnExit", ()):
        asked = (("onStatusReason", status), ("onReason", reason), ("onExitCode", str(code)))
        if all(fnmatch(value.lower(), rule[name].lower()) for name, value in asked if name in rule):
            return str(rule["action"]).upper() == "RETRY"
    return True


def _resident_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = next((line for line in status.splitlines() if line.startswith("VmRSS")), "x 0")
    return int(found.split()[1]) / 1024


def _moto_job() -> Any:
    """moto's class of jobs."""
    from moto.batch.models import Job

    return Job

"""Jobs on AWS Batch, as an ``Invoker`` makes invocations: submitted together, looked at together, and paid for.

``SubmitJob`` knows no token that would make two of the same call one job, so boto3 never repeats it: where its reply is
lost the job is looked for by its name, which no other has. Jobs are looked at a hundred to a request, at intervals that
grow while nothing happens.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from prefect_slo.aws.arrays import Submitter
from prefect_slo.aws.batch import LOG_GROUP, BatchJobs
from prefect_slo.aws.invoke import Answer, Failed, Why, always, cause
from prefect_slo.aws.refusals import with_advice
from prefect_slo.aws.report import Billed
from prefect_slo.aws.s3 import S3Prefix

LOG_LINES = 20
_DESCRIBED = 100
_ENDED = ("SUCCEEDED", "FAILED")
_JOB_NAME = 128
SUBMIT_TRIES, SUBMIT_WAIT_S = 6, 1.0
"""Of a submission that is throttled, and of looking for one whose reply was lost; the wait doubles."""

PATIENCE_S = 600.0
"""How long Batch may be asked in vain, or say nothing of one job: of an array, jobs appear one after another."""

_MISSING = "MISSING"


@dataclass
class BatchInvoker:
    """Runs events as jobs, as an ``Invoker`` runs them as invocations.

    Args:
        jobs: How they are run.
        store: Where events and replies lie.
        clock: Seconds that pass.
        sleep: Waits for some seconds.
        now: Seconds since 1970, as instants of jobs are given.
    """

    jobs: BatchJobs
    store: S3Prefix
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.time
    _watch: Watch = field(init=False)
    _submitter: Submitter = field(init=False)

    def __post_init__(self) -> None:
        self._watch = Watch(self.jobs.batch, *self.jobs.poll_s, clock=self.clock, sleep=self.sleep)
        self._submitter = Submitter(self._submit, self.store, self.jobs.gather_s)

    def call(
        self,
        function: str,
        event: dict[str, Any],
        *,
        again: bool,
        cancelled: threading.Event,
        sent: threading.Event | None = None,
        more: Callable[[], bool] = always,
    ) -> Answer:
        """Have a job run an event; ``function``, ``again`` and ``more`` say nothing here.

        ``sent`` is set from when it is submitted: what throttles that ends in a job all the same.

        Raises:
            Failed: It gave no result; its message has the end of its log.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        where = event["out"]["key"]
        begun = self.clock()
        try:
            self.store.put(f"{where}/event", json.dumps(event).encode())
            if sent is not None:
                sent.set()
            submitted = self._submitter.job(self._name(where), where)
        except (ClientError, BotoCoreError) as error:
            raise Failed("start", with_advice(f"no job could be submitted ({error})", error)) from None
        except Failed as failed:  # told to all that asked together: each has a failure of its own
            own = Failed(failed.why, failed.detail)
            own.lost = int(failed.why == "unknown")
            raise own from None
        _UNDER_WAY[submitted] = (self.jobs, where)
        try:
            job = self._watch.ended(submitted, cancelled)
            if job is None:
                self._terminate(submitted, "cancelled")
                raise self._cancelled(submitted)
        except Failed as failed:
            raise failed if failed.why == "cancelled" else self._given_up(submitted, failed.detail) from None
        finally:
            _UNDER_WAY.pop(submitted, None)
        billed = self._bill(job)
        if job["status"] == "FAILED":
            raise self._failed(job, billed)
        try:
            reply = json.loads(self.store.get(f"{where}/reply"))
        except (ClientError, BotoCoreError, ValueError) as error:
            raise Failed("unknown", f"the reply of its job cannot be read ({error})", billed=billed) from None
        return Answer(reply, begun, self.clock(), self._waited(job), None, billed, stored=True)

    def _name(self, where: str) -> str:
        """The name of the job for some work, which no other job has."""
        own = where.rpartition("/runs/")[2].replace("/", "-")
        return f"{self.jobs.prefix[: max(_JOB_NAME - len(own) - 1, 1)]}-{own}"[:_JOB_NAME]

    def _submit(self, name: str, event: str, **more: Any) -> str:
        """Submit a job, once.

        Raises:
            Failed: It was refused, throttled for too long, or did not get there; or its reply was lost, and none of its
            name is there.
        """
        asked = {"jobName": name, "jobQueue": self.jobs.queue_name, "jobDefinition": self.jobs.definition}
        wait_s = SUBMIT_WAIT_S
        for attempt in range(SUBMIT_TRIES):
            try:
                return str(self.jobs.submitting.submit_job(**asked, parameters={"event": event}, **more)["jobId"])
            except Exception as error:
                why, detail = cause(error)
            if why == "unknown":
                return self._found(name, detail)
            if why not in ("throttled", "unreached") or attempt == SUBMIT_TRIES - 1:
                break
            self.sleep(random.uniform(0.0, wait_s))
            wait_s *= 2
        raise Failed(why, f"no job could be submitted: {detail}")

    def _found(self, name: str, detail: str) -> str:
        """The job of a name whose submission had no reply.

        Raises:
            Failed: There is none, as far as Batch says; it may appear later.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        named, wait_s = [{"name": "JOB_NAME", "values": [name]}], SUBMIT_WAIT_S
        for attempt in range(SUBMIT_TRIES):
            try:
                listed = self.jobs.batch.list_jobs(jobQueue=self.jobs.queue_name, filters=named)["jobSummaryList"]
            except (ClientError, BotoCoreError) as error:
                detail, listed = f"{detail}; its name cannot be looked for: {error}", []
            if listed:
                return str(listed[0]["jobId"])
            if attempt < SUBMIT_TRIES - 1:
                self.sleep(wait_s)
                wait_s *= 2
        raise Failed("unknown", f"a job was submitted, {detail}, and none of its name is there")

    def _terminate(self, job: str, reason: str) -> str:
        """Ask for the end of a job that nobody waits for any more; in words what keeps Batch from it, if anything."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self.jobs.batch.terminate_job(jobId=job, reason=reason)
        except (ClientError, BotoCoreError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _given_up(self, job: str, detail: str) -> Failed:
        """The end of a job that could not be watched: whatever it still does, nobody takes it any more."""
        refused = self._terminate(job, "its flow run could not watch it")
        then = "Batch was asked to end it"
        if refused:
            then = (
                f"nor can it be ended ({refused}): it may run on, and is billed, for up to {self.jobs.timeout_s} s an "
                f"attempt. 'aws batch terminate-job --reason lost --job-id {job}' ends it"
            )
        failed = Failed("unknown", f"{detail}; {then}")
        failed.lost = 1
        return failed

    def _cancelled(self, job: str) -> Failed:
        """The end of a job that was terminated: it is billed until then, as far as Batch says."""
        from botocore.exceptions import BotoCoreError, ClientError

        failed = Failed("cancelled", "cancelled while its job was under way")
        try:
            [described] = self.jobs.batch.describe_jobs(jobs=[job])["jobs"]
        except (ClientError, BotoCoreError, ValueError):
            failed.lost = 1
        else:
            failed.billed = self._bill(described)
        return failed

    def _bill(self, job: dict[str, Any]) -> Billed:
        """Time of every attempt that started, a minute at least, at the price list; Batch itself costs nothing.

        An attempt that has not stopped is billed until now.
        """
        attempts = list(job.get("attempts") or [job])
        if job.get("status") == "RUNNING" and all("stoppedAt" in one for one in attempts):
            attempts.append(job)  # attempts are those that have ended
        attempts = [one for one in attempts if one.get("startedAt")]
        least_ms, now_ms = int(1000 * self.jobs.least_s), int(1000 * self.now())
        ran_ms = sum(max(int(one.get("stoppedAt") or now_ms) - int(one["startedAt"]), least_ms) for one in attempts)
        return Billed(Decimal(ran_ms) / 1000 * Decimal(repr(self.jobs.usd_s)), ran_ms, int(bool(attempts)))

    @staticmethod
    def _waited(job: dict[str, Any]) -> float:
        return max(int(job.get("startedAt", 0)) - int(job.get("createdAt", 0)), 0) / 1000

    def _failed(self, job: dict[str, Any], billed: Billed) -> Failed:
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
        failed = Failed(why, detail, memory_mb=float(self.jobs.memory_mb), billed=billed)
        failed.on_batch = True
        return failed

    def _log_tail(self, container: dict[str, Any]) -> str:
        from botocore.exceptions import BotoCoreError, ClientError

        stream = container.get("logStreamName")
        if not stream:
            return ""
        try:
            events = self.jobs.logs.get_log_events(
                logGroupName=LOG_GROUP, logStreamName=stream, limit=LOG_LINES, startFromHead=False
            )["events"]
        except (ClientError, BotoCoreError) as error:
            return f"; its log cannot be read ({error})"
        return "; the end of its log:\n" + "\n".join(event["message"] for event in events) if events else ""


_UNDER_WAY: dict[str, tuple[BatchJobs, str]] = {}
"""Jobs that threads of this process wait for: how they are run, and where their event lies."""


def end_jobs(run_key: str = "") -> None:
    """Ask for the end of the jobs of a run, or of all, that are still under way.

    The threads that wait for them would, but the process may end before: after Ctrl-C, or a signal to terminate.
    """
    mine = [(job, jobs) for job, (jobs, where) in _UNDER_WAY.copy().items() if run_key in where]
    for job, jobs in {job.partition(":")[0]: jobs for job, jobs in mine}.items():  # of an array, the whole
        with suppress(Exception):  # the run is over, whatever keeps Batch from it
            jobs.submitting.terminate_job(jobId=job, reason="its flow run has ended")


atexit.register(end_jobs)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_UNDER_WAY.clear)


class Watch:
    """One thread that looks at every job that somebody waits for.

    Args:
        batch: Client of Batch.
        least_s: Least wait between two looks.
        most_s: Most of it: waits grow while nothing happens, and while Batch can't be asked.
        patience_s: How long that may last.
        clock: Seconds that pass.
        sleep: Waits for some seconds.
    """

    def __init__(
        self,
        batch: Any,
        least_s: float,
        most_s: float,
        *,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._batch, self._least_s, self._most_s, self._patience_s = batch, least_s, most_s, patience_s
        self._clock, self._sleep = clock, sleep
        self._absent: dict[str, float] = {}
        self._news = threading.Condition()
        self._waiting: set[str] = set()
        self._jobs: dict[str, dict[str, Any]] = {}
        self._broken: Exception | None = None
        self._thread: threading.Thread | None = None
        self._fresh = threading.Event()

    def ended(self, job: str, cancelled: threading.Event) -> dict[str, Any] | None:
        """What a job was when it ended; ``None`` where nobody wants it any more.

        Raises:
            Failed: Batch did not say for as long as there is patience; who asks later is told again as soon as it does.
        """
        with self._news:
            self._waiting.add(job)
            self._fresh.set()
            if self._thread is None:
                self._broken = None
                self._thread = threading.Thread(target=self._look, name="prefect-slo-batch", daemon=True)
                self._thread.start()
            while job not in self._jobs:
                if cancelled.is_set() or self._broken is not None:
                    self._waiting.discard(job)
                    if self._broken is not None:
                        raise Failed("unknown", f"its job cannot be looked at ({self._broken})")
                    return None
                self._news.wait(0.5)
            ended = self._jobs.pop(job)
        if ended["status"] == _MISSING:
            raise Failed("unknown", f"Batch has said nothing of job {job} for {self._patience_s:.0f} s")
        return ended

    def _look(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        pause_s, heard = self._least_s, self._clock()
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
                if cause(error)[0] != "start" and self._clock() - heard < self._patience_s:
                    self._sleep(pause_s)
                    pause_s = min(2 * pause_s, self._most_s)
                    continue
                with self._news:
                    self._broken, self._thread = error, None
                    self._news.notify_all()
                return
            heard, told = self._clock(), {job["jobId"]: job for page in pages for job in page}
            done = {job: found for job, found in told.items() if found["status"] in _ENDED}
            done.update(self._missing(ids, told, heard))
            with self._news:
                self._jobs.update({job: found for job, found in done.items() if job in self._waiting})
                self._waiting -= set(done)
                self._news.notify_all()
            pause_s = self._least_s if done or self._fresh.is_set() else min(1.5 * pause_s, self._most_s)
            self._fresh.clear()
            self._sleep(self._least_s)
            self._fresh.wait(pause_s - self._least_s)

    def _missing(self, ids: list[str], told: dict[str, Any], now: float) -> dict[str, dict[str, Any]]:
        """Jobs that Batch has said nothing of for so long that it never will."""
        self._absent = {job: self._absent.get(job, now) for job in ids if job not in told}
        given_up = [job for job, since in self._absent.items() if now - since >= self._patience_s]
        return {job: {"jobId": job, "status": _MISSING} for job in given_up}

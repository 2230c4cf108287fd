"""Pools on AWS, for ``SLOTaskRunner(pools=[...])`` and ``@slo(pools=[...])``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from typing import Any

from prefect.context import FlowRunContext
from prefect.logging import get_logger

from prefect_slo.aws import limits
from prefect_slo.aws.batch import BatchJobs
from prefect_slo.aws.clients import GRACE_S
from prefect_slo.aws.clients import client as aws_client
from prefect_slo.aws.concurrency import remembered
from prefect_slo.aws.delegating import Delegating
from prefect_slo.aws.exchange import Exchange
from prefect_slo.aws.functions import Architecture, FunctionStatus, WorkerFunctions
from prefect_slo.aws.invoke import Invoker
from prefect_slo.aws.jobs import BatchInvoker
from prefect_slo.aws.kept import place_name, place_of
from prefect_slo.aws.permissions import documents, policy, storage
from prefect_slo.aws.report import bill
from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.aws.spending import SpendLimit
from prefect_slo.control.delegation import By, Limits, Needs, Terms
from prefect_slo.errors import InvalidValue
from prefect_slo.pricing import price_list
from prefect_slo.resources import Capacity, Pool, Size
from prefect_slo.runner.backends.aws_lambda import LambdaBackend
from prefect_slo.runner.ids import uuid7
from prefect_slo.runner.pools import worker_counts
from prefect_slo.runner.spend_caps import cap_of, capped
from prefect_slo.units import items, positive

PRICES = {"x86_64": "aws-lambda-x86", "arm64": "aws-lambda-arm"}
HARDWARE = {"x86_64": "lambda", "arm64": "lambda-arm"}
KEPT_DAYS = 1
"""What runs have left under the prefix is deleted by S3 after a day, should the run itself not have done it."""


@dataclass(frozen=True)
class LambdaPool:
    """Workers on AWS Lambda: a generic worker function for each memory size, deployed by ``prefect-slo aws deploy``.

    Args:
        memory_mb: Memory sizes, in MB; a vCPU comes with every 1,769 MB.
        workers: Worker counts for menus; by default powers of four up to ``concurrency``.
        concurrency: Invocations that a flow run may have under way at once; fewer, where the account or a reservation
            has less.
        bucket: ``s3://bucket/prefix``, an ``S3Prefix``, or a block (``S3PrefixBlock``, or ``S3Bucket`` of prefect-aws)
            for what is too large for a request; without one, arguments and results must fit into 6 MB. The pool keeps
            to a folder of its own there, which its names make.
        once: Claim every invocation on S3 before it runs, so that one whose reply was lost never runs twice. Takes a
            bucket, and two writes for every invocation.
        role: ARN of the functions' role; needed to deploy.
        timeout_s: Limit of one invocation, in seconds, at most 900.
        architecture: ``x86_64`` or ``arm64``.
        layers: ARNs of layers that bring the packages that tasks import.
        image: URI of a container image that brings them instead.
        storage_mb: Temporary disk of the functions.
        environment: Variables of the functions.
        reserved: Concurrency set aside for each function.
        patience_s: How long one invocation may be throttled in all.
        prices: Price list; by default that of the architecture.
        prefix: Names of functions begin with it. With the pool's own name it says whose they are: one pool leaves what
            another has made alone.
        region: As boto3 finds it by default. Bucket and jobs are there, too, unless they have a region of their own.
        endpoint: Address of something that stands for AWS, also for bucket and jobs without one of their own.
        name: What tasks, menus and plans call the pool.
        batch: Jobs on AWS Batch for what a function could not finish (its timeout, its memory, throttling without end).
            Once enough of a task has been seen, Batch is taken at once where that is expected to be better.
        by: What that is judged by: ``latency`` or ``cost``.
        max_spend_usd: What one flow run may spend on this pool; what would go beyond it is not started, and fails with
            ``SpendLimitReached``. Processes don't share it: a retry in another one begins anew.
        needs: What the tasks of this pool need, where that is known: what no function has goes to Batch at once.

    Raises:
        InvalidValue: A setting that Lambda does not have.
    """

    memory_mb: tuple[int, ...] = (512, 1024, 1769, 3538)
    workers: tuple[int, ...] = ()
    concurrency: int = 64
    bucket: Any = None
    once: bool = False
    role: str | None = None
    timeout_s: int = 900
    architecture: Architecture = "x86_64"
    layers: tuple[str, ...] = ()
    image: str | None = None
    storage_mb: int = 512
    environment: dict[str, str] = field(default_factory=dict)
    reserved: int | None = None
    patience_s: float = 300.0
    prices: str | None = None
    prefix: str = "prefect-slo"
    region: str | None = None
    endpoint: str | None = None
    name: str = "lambda"
    batch: BatchJobs | None = None
    by: By = "latency"
    max_spend_usd: float | None = None
    needs: Needs = field(default_factory=Needs)

    def __post_init__(self) -> None:
        sizes = tuple(sorted({limits.memory_mb(value) for value in items(self.memory_mb, "lambda.memory_mb")}))
        if not sizes:
            raise InvalidValue("lambda.memory_mb", self.memory_mb, "at least one memory size")
        object.__setattr__(self, "memory_mb", sizes)
        object.__setattr__(self, "workers", worker_counts(self.workers, self.concurrency, "lambda"))
        if self.reserved is not None and self.reserved < self.concurrency:
            raise InvalidValue("lambda.concurrency", self.concurrency, f"at most the {self.reserved} that are reserved")
        positive(self.patience_s, "lambda.patience_s")
        if self.max_spend_usd is not None:
            positive(self.max_spend_usd, "lambda.max_spend_usd")
        if self.bucket is not None:
            object.__setattr__(self, "bucket", S3Prefix.of(self.bucket).near(self.region, self.endpoint))
        for option in ("once", "batch"):
            if getattr(self, option) and self.bucket is None:
                raise InvalidValue(f"lambda.{option}", getattr(self, option), "none, or a bucket besides")
        if self.batch is not None:
            batch = replace(self.batch.near(self.region, self.endpoint), pool=self.name)
            object.__setattr__(self, "batch", batch)
        self.functions  # noqa: B018 (checks its own settings)
        price_list(self._prices)

    @property
    def pool(self) -> Pool:
        """Its sizes, worker counts and prices."""
        hardware = HARDWARE[self.architecture]
        sizes = tuple(Size(limits.vcpus(memory), memory, hardware=hardware) for memory in self.memory_mb)
        if self.bucket is None:
            return Pool(self.name, sizes, self._prices, self.workers, "requests")
        return Pool(self.name, sizes, self._prices, self.workers, "storage", place_name(self.bucket))

    @property
    def capacity(self) -> Capacity:
        """Its concurrency, or what its account has for it, once a run has asked."""
        names = [self.functions.name(memory) for memory in self.memory_mb]
        known = remembered(self.region, self.endpoint, names)
        return Capacity(workers=max(known.of_all(names, self.concurrency), 1))

    def backend(self, client: Any) -> LambdaBackend:
        """A backend for one flow run. It stays within what the account, and each function, has at once."""
        names, functions = [self.functions.name(memory) for memory in self.memory_mb], self.functions
        found = functions.allowed(self.memory_mb)
        together = found.of_all(names, self.concurrency)
        if together < self.concurrency:
            get_logger("slo").warning(
                "Pool %r asks for %d invocations at once; its account has %d for it (%s). Ask AWS for more, or set "
                "concurrency=%d.", self.name, self.concurrency, together, found, together,
            )  # fmt: skip
        return LambdaBackend(
            self.exchange(),
            functions.name,
            concurrency=max(together, 1),
            memory_mb=max(self.memory_mb),
            run_key=_run_key(),
            hardware=HARDWARE[self.architecture],
            place=place_of(self.bucket) if self.bucket is not None else None,
            of_size={
                memory: max(found.of(name, self.concurrency), 1)
                for memory, name in zip(self.memory_mb, names, strict=True)
            },
        )

    def exchange(self) -> Exchange | Delegating:
        """Sends work to the functions, and to Batch what they can't do."""
        lambdas = aws_client(
            "lambda",
            region=self.region,
            endpoint=self.endpoint,
            read_s=self.timeout_s + GRACE_S,
            connections=self.concurrency,
        )
        prices, cap = price_list(self._prices), cap_of(self.functions.owner, self.max_spend_usd)
        longest_ms = 1000 * (self.timeout_s + limits.INIT_S)
        functions = Exchange(
            capped(
                Invoker(lambdas, prices, self.patience_s, self.storage_mb),
                cap,
                lambda name: bill(prices, _memory_mb(name), longest_ms, storage_mb=self.storage_mb),
            ),
            self._store,
            self.once,
            cap,
        )
        if self.batch is None:
            return functions
        assert self._store is not None
        return Delegating(
            functions,
            replace(_jobs(self.batch, self._store, self.once, cap), shared=functions.shared),
            "lambda-batch",
            self.needs,
            Limits(float(max(self.memory_mb)), float(self.storage_mb), float(self.timeout_s)),
            self._terms,
            self.by,
        )

    @property
    def functions(self) -> WorkerFunctions:
        """How its functions are deployed."""
        return WorkerFunctions(
            prefix=self.prefix,
            pool=self.name,
            role=self.role,
            timeout_s=self.timeout_s,
            architecture=self.architecture,
            layers=self.layers,
            image=self.image,
            storage_mb=self.storage_mb,
            environment=self.environment,
            reserved=self.reserved,
            region=self.region,
            endpoint=self.endpoint,
        )

    def deploy(self) -> list[str]:
        """Create the functions that there aren't, and have S3 delete what runs leave; returns the functions' names."""
        names = self.functions.deploy(self.memory_mb)
        if self.batch is not None:
            names.append(self.batch.deploy())
        if self._store is not None:
            self._store.expire(KEPT_DAYS)
        return names

    def status(self) -> list[FunctionStatus]:
        """The functions as the account has them, and what jobs on Batch need."""
        return [*self.functions.status(self.memory_mb), *(self.batch.status() if self.batch is not None else ())]

    def destroy(self, *, only_old: bool = False) -> list[str]:
        """Delete the functions, or those of earlier versions, and what is stored; returns the functions' names."""
        gone = self.functions.destroy(only_old=only_old, memory_mb=self.memory_mb)
        if self.batch is not None:
            gone += self.batch.destroy(only_old=only_old)
        if self._store is not None and not only_old:
            _empty(self._store)
        return gone

    def policy(self) -> dict[str, Any]:
        """The least that callers, functions and deployers may do, as IAM policy documents."""
        besides = self.batch.policy() if self.batch is not None else None
        return policy(self.functions, self._store, besides, shared=self.bucket)

    def _terms(self, function: str) -> Terms:
        """What a function and a job cost, in time and money."""
        assert self.batch is not None
        rate = price_list(self._prices).rate(0.0, _memory_mb(function))
        return Terms(
            float(self.timeout_s), self.batch.launch_s, rate, self.batch.usd_s, batch_least_s=self.batch.least_s
        )

    @cached_property
    def _store(self) -> S3Prefix | None:
        return self.bucket.under(str(self.functions.owner)) if self.bucket is not None else None

    @property
    def _prices(self) -> str:
        return self.prices or PRICES[self.architecture]


@dataclass(frozen=True)
class BatchPool:
    """Workers on AWS Batch alone: every bundle is a job. For what takes minutes, a GPU, or more than a function has.

    Args:
        jobs: How jobs are run. Their queue and the bucket are of the same ``region`` and ``endpoint``, unless they have
            their own.
        bucket: ``s3://bucket/prefix``, an ``S3Prefix`` or a block: events, arguments and results lie there.
        workers: Worker counts for menus; by default powers of four up to ``concurrency``.
        concurrency: Jobs that a flow run may have under way at once.
        hardware: Name that its measurements are kept under, e.g. ``l4``: the price list may have a price of its own.
        name: What tasks, menus and plans call the pool.
        once: Claim every job on S3 before its work begins, so that a job that Batch starts again never runs it twice.
        max_spend_usd: What jobs of one flow run may cost together; what could go beyond it is not started. Processes
            don't share it: a retry in another one begins anew.

    Raises:
        InvalidValue: A setting that can't be.
    """

    jobs: BatchJobs
    bucket: Any
    workers: tuple[int, ...] = ()
    concurrency: int = 64
    hardware: str = "batch"
    name: str = "batch"
    once: bool = False
    max_spend_usd: float | None = None

    def __post_init__(self) -> None:
        if self.max_spend_usd is not None:
            positive(self.max_spend_usd, "batch.max_spend_usd")
        jobs = replace(self.jobs.near(self.jobs.region, self.jobs.endpoint), pool=self.name)
        object.__setattr__(self, "bucket", S3Prefix.of(self.bucket).near(jobs.region, jobs.endpoint))
        object.__setattr__(self, "jobs", jobs)
        object.__setattr__(self, "workers", worker_counts(self.workers, self.concurrency, "batch"))
        self.pool  # noqa: B018 (checks its size)

    @property
    def pool(self) -> Pool:
        """Its size, worker counts and prices."""
        jobs = self.jobs
        size = Size(jobs.vcpus, jobs.memory_mb, float(jobs.gpu), self.hardware)
        return Pool(self.name, (size,), jobs.prices, self.workers, "storage", place_name(self.bucket))

    @property
    def capacity(self) -> Capacity:
        """Its concurrency."""
        return Capacity(workers=self.concurrency)

    def backend(self, client: Any) -> LambdaBackend:
        """A backend for one flow run."""
        definition = self.jobs.definition
        return LambdaBackend(
            _jobs(self.jobs, self._store, self.once, cap_of(self.jobs.owner, self.max_spend_usd)),
            lambda memory_mb: definition,
            concurrency=self.concurrency,
            memory_mb=self.jobs.memory_mb,
            run_key=_run_key(),
            hardware=self.hardware,
            place=place_of(self.bucket),
        )

    def deploy(self) -> list[str]:
        """Register the job definition unless it is there, and have S3 delete what runs leave."""
        names = [self.jobs.deploy()]
        self._store.expire(KEPT_DAYS)
        return names

    def status(self) -> list[FunctionStatus]:
        """Job definitions and the queue as the account has them."""
        return self.jobs.status()

    def destroy(self, *, only_old: bool = False) -> list[str]:
        """Deregister job definitions, or those of earlier settings; else delete what is stored and a queue of ours."""
        gone = self.jobs.destroy(only_old=only_old)
        if not only_old:
            _empty(self._store)
        return gone

    def policy(self) -> dict[str, Any]:
        """The least that callers, jobs and deployers may do, as IAM policy documents."""
        needs = storage(self._store, shared=self.bucket)
        return documents({who: [*self.jobs.policy().get(who, []), *statements] for who, statements in needs.items()})

    @cached_property
    def _store(self) -> S3Prefix:
        store: S3Prefix = self.bucket
        return store.under(str(self.jobs.owner))


def _empty(store: S3Prefix) -> None:
    """Delete what a pool has stored, and its rule that does."""
    store.delete()
    store.keep()


def _jobs(jobs: BatchJobs, store: S3Prefix, once: bool, cap: SpendLimit | None) -> Exchange:
    """Sends work to jobs; the most that one can cost is what all of its attempts do that run into their time limit."""
    most_usd = Decimal(repr(jobs.usd_s)) * Decimal(repr(max(jobs.timeout_s, jobs.least_s))) * jobs.attempts
    return Exchange(capped(BatchInvoker(jobs, store), cap, lambda name: most_usd), store, once, cap)


def _memory_mb(function: str) -> int:
    """Memory of a worker function, which its name ends with."""
    return int(function.rpartition("-")[2])


def _run_key() -> str:
    """Names what one session stores: a flow run that is retried numbers its bundles from 1 again."""
    context = FlowRunContext.get()
    own = str(uuid7())
    return f"{context.flow_run.id}-{own}" if context is not None and context.flow_run is not None else own

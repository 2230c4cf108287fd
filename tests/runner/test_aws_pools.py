"""What a Lambda pool offers, and settings that Lambda does not have."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from uuid import uuid4

import cloudpickle
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext

from prefect_slo import BatchJobs, BatchPool, BatchQueue, LambdaPool
from prefect_slo.aws.packaging import worker_zip
from prefect_slo.aws.s3 import S3Prefix
from prefect_slo.errors import InvalidValue
from prefect_slo.runner import spend_caps
from prefect_slo.runner.aws_pools import _run_key
from prefect_slo.runner.pools import by_name

ROLE = "arn:aws:iam::123456789012:role/worker"


def test_a_pool_offers_its_memory_sizes_at_lambdas_prices() -> None:
    pool = LambdaPool(memory_mb=(1769, 512), concurrency=100)
    assert [(size.memory_mb, size.hardware) for size in pool.pool.sizes] == [(512, "lambda"), (1769, "lambda")]
    assert pool.pool.sizes[1].vcpus == 1.0
    assert pool.pool.workers == (1, 4, 16, 64, 100)
    assert pool.pool.prices == "aws-lambda-x86"
    assert pool.capacity.workers == 100
    assert LambdaPool(architecture="arm64").pool.prices == "aws-lambda-arm"


def test_a_pool_travels_with_its_flow() -> None:
    pool = LambdaPool(bucket="s3://bucket/prefix", role=ROLE, name="batch-jobs")
    again = cloudpickle.loads(cloudpickle.dumps(pool))
    assert again == pool
    assert again.functions.name(512) == pool.functions.name(512)
    assert by_name([pool]) == {"batch-jobs": pool}


def test_a_functions_name_changes_with_what_it_is_and_with_nothing_else() -> None:
    name = LambdaPool(role=ROLE).functions.name(512)
    assert LambdaPool(role=ROLE, memory_mb=(128,), concurrency=2).functions.name(512) == name
    for other in ({"timeout_s": 60}, {"layers": ("arn:l",)}, {"environment": {"A": "1"}}, {"architecture": "arm64"}):
        assert LambdaPool(role=ROLE, **other).functions.name(512) != name


def test_the_package_is_the_same_bytes_every_time() -> None:
    first = worker_zip()
    worker_zip.cache_clear()
    assert worker_zip() == first
    assert len(first) < 200_000


@pytest.mark.parametrize(
    "settings",
    [
        {"memory_mb": (64,)},
        {"memory_mb": (20_480,)},
        {"memory_mb": ()},
        {"timeout_s": 1000},
        {"timeout_s": 0},
        {"storage_mb": 100},
        {"concurrency": 0},
        {"workers": (1, 65)},
        {"layers": ("a",) * 6},
        {"layers": ("a",), "image": "uri"},
        {"environment": {"A": "x" * 5000}},
        {"architecture": "riscv"},
        {"reserved": 10},
        {"once": True},
        {"bucket": "my-bucket"},
        {"patience_s": 0},
        {"prefix": "no spaces"},
        {"prices": "free-lunch"},
    ],
)
def test_settings_that_lambda_does_not_have_are_refused(settings) -> None:
    with pytest.raises(InvalidValue):
        LambdaPool(**settings)


HERE = ("eu-west-1", "http://127.0.0.1:1")


def test_all_that_a_pool_asks_it_asks_where_it_is() -> None:
    region, endpoint = HERE
    queue = BatchQueue("q", subnets=("s",), security_groups=("g",))
    jobs = BatchJobs(queue, "image", memory_mb=2048, execution_role=ROLE)
    for bucket in ("s3://bucket/prefix", S3Prefix("bucket")):
        both = LambdaPool(region=region, endpoint=endpoint, bucket=bucket, batch=jobs)
        alone = BatchPool(replace(jobs, region=region, endpoint=endpoint), bucket)
        asked = (both.bucket, both._store, both.batch, both.batch.queue, alone.bucket, alone._store, alone.jobs.queue)
        assert [(one.region, one.endpoint) for one in asked] == [HERE] * len(asked)


def test_what_lies_elsewhere_stays_there() -> None:
    own = {"region": "us-west-2", "endpoint": "http://127.0.0.1:2"}
    pool = LambdaPool(
        region=HERE[0], endpoint=HERE[1], bucket=S3Prefix("b", **own), batch=BatchJobs("q", "image", **own)
    )
    asked = (pool._store, pool.batch)
    assert [(one.region, one.endpoint) for one in asked] == [tuple(own.values())] * 2


def test_without_a_role_nothing_is_deployed() -> None:
    with pytest.raises(InvalidValue, match=r"aws policy"):
        LambdaPool().deploy()


def test_what_two_attempts_of_a_flow_run_store_lies_apart() -> None:
    flow_run = FlowRun(id=uuid4(), flow_id=uuid4())
    with FlowRunContext.model_construct(flow_run=flow_run):
        first, second = _run_key(), _run_key()
    assert first != second
    assert first.startswith(str(flow_run.id))
    assert second.startswith(str(flow_run.id))


def test_attempts_of_a_flow_run_spend_of_one_cap_and_other_runs_and_pools_of_theirs(monkeypatch) -> None:
    def limit(run: FlowRun, **settings: object):
        with FlowRunContext.model_construct(flow_run=run):
            return LambdaPool(region="eu-west-1", **settings).exchange().limit

    one, other = FlowRun(id=uuid4(), flow_id=uuid4()), FlowRun(id=uuid4(), flow_id=uuid4())
    first = limit(one, max_spend_usd=1.0)
    first.add(Decimal("0.75"))
    again = limit(one, max_spend_usd=2.0)
    assert (again.spent_usd, again.most_usd) == (Decimal("0.75"), 2), "the cap is what the pool says now"
    assert limit(one, max_spend_usd=1.0, name="another").spent_usd == 0
    assert limit(other, max_spend_usd=1.0).spent_usd == 0
    assert limit(one) is None
    monkeypatch.setattr(spend_caps, "KEPT", 2)
    for _ in range(10):
        limit(FlowRun(id=uuid4(), flow_id=uuid4()), max_spend_usd=1.0)
    assert limit(one, max_spend_usd=1.0) is not first, "only so many are kept"


def test_functions_may_find_that_an_object_is_not_there_and_deployers_may_delete() -> None:
    """Without ``ListBucket`` S3 answers 403 where a key is missing."""
    policy = LambdaPool(bucket="s3://bucket/prefix").policy()
    actions = {who: {a for s in policy[who]["Statement"] for a in s["Action"]} for who in policy}
    assert {"s3:ListBucket", "s3:AbortMultipartUpload"} <= actions["worker"]
    assert {"s3:ListBucket", "s3:DeleteObject"} <= actions["deployer"]

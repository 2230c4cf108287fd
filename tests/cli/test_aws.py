"""``prefect-slo aws``: functions of a pool from nothing to nothing, in a mocked account."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from prefect_slo.aws.clients import forget_clients
from prefect_slo.aws.packaging import worker_zip
from prefect_slo.testing.aws import LocalAws, local_aws


@pytest.fixture(scope="module")
def account() -> Iterator[LocalAws]:
    with local_aws() as account:
        yield account


@pytest.fixture
def pool(account: LocalAws, tmp_path: Path) -> str:
    """The entry point of a pool."""
    file = tmp_path / "pools.py"
    file.write_text(
        "from prefect_slo import LambdaPool\n"
        f"pool = LambdaPool(memory_mb=(128, 256), role={account.role!r}, bucket={account.bucket!r})\n"
        "nothing = 3\n"
    )
    return f"{file}:pool"


def test_functions_are_deployed_compared_and_removed(run, pool, account) -> None:
    assert run("aws", "status", pool).code == 1, "they are missing"
    deployed = run("aws", "deploy", pool, "--json").document["functions"]
    assert len(deployed) == 2
    assert run("aws", "deploy", pool, "--json").document["functions"] == deployed, "what there is stays"
    status = run("aws", "status", pool, "--json")
    assert status.code == 0
    assert {row["state"] for row in status.document["functions"]} == {"deployed"}

    boto3.client("lambda").update_function_configuration(FunctionName=deployed[0], Timeout=3)
    changed = run("aws", "status", pool, "--json")
    assert changed.code == 1
    assert [row["state"] for row in changed.document["functions"]].count("changed") == 1
    boto3.client("lambda").update_function_code(FunctionName=deployed[1], ZipFile=worker_zip() + b"x")
    changed = run("aws", "status", pool, "--json")
    assert [row["state"] for row in changed.document["functions"]].count("changed") == 2, "other code, too"

    assert run("aws", "destroy", pool, "--json").document["deleted"] == deployed
    assert {row["state"] for row in run("aws", "status", pool, "--json").document["functions"]} == {"missing"}


def test_old_versions_alone_can_be_removed(run, pool, account) -> None:
    older = account.pool(memory_mb=(128,), timeout_s=5).functions.name(128)
    run("aws", "deploy", pool)
    assert run("aws", "destroy", pool, "--old", "--json").document["deleted"] == [older]
    assert run("aws", "status", pool).code == 0
    run("aws", "destroy", pool)


def test_policies_name_functions_and_objects_and_nothing_more(run, pool) -> None:
    policies = run("aws", "policy", pool).document
    assert set(policies) == {"caller", "worker", "deployer"}
    statements = [statement for one in policies.values() for statement in one["Statement"]]
    assert all("*" not in action for statement in statements for action in statement["Action"])
    everything = [statement["Action"] for statement in statements if statement["Resource"] == "*"]
    assert everything == [["lambda:GetAccountSettings"], ["lambda:ListFunctions"]], "which have no resource"
    assert "arn:aws:s3:::prefect-slo-test/prefect-slo/prefect-slo/lambda/*" in {
        statement["Resource"] for statement in statements
    }


def test_the_worker_of_an_image_answers_where_neither_prefect_nor_the_package_is(run, tmp_path) -> None:
    assert "${LAMBDA_TASK_ROOT}; the handler is prefect_slo_worker.handler" in run("aws", "worker", tmp_path / "w").out
    code = (
        f"import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [{str(tmp_path / 'w')!r}]\n"
        "import cloudpickle, prefect_slo_worker\n"
        "assert not {'prefect', 'prefect_slo'} & set(sys.modules)\n"
        "print(prefect_slo_worker.handler({'warm': True}, None)['ok'])"
    )
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "True", ran.stderr


@pytest.fixture
def batch(account: LocalAws, tmp_path: Path) -> str:
    """The entry point of a pool on Batch, with a queue of its own."""
    ec2 = boto3.client("ec2", region_name="us-east-1")
    subnet = ec2.describe_subnets()["Subnets"][0]
    [group, *_] = ec2.describe_security_groups(Filters=[{"Name": "vpc-id", "Values": [subnet["VpcId"]]}])[
        "SecurityGroups"
    ]
    file = tmp_path / "jobs.py"
    file.write_text(f"""
from prefect_slo import BatchJobs, BatchPool, BatchQueue
queue = BatchQueue("cli-jobs", subnets=({subnet["SubnetId"]!r},), security_groups=({group["GroupId"]!r},),
                   service_role={account.role!r}, region="us-east-1")
jobs = BatchJobs(queue, "image", memory_mb=2048, execution_role={account.role!r}, prefix="cli", region="us-east-1")
pool = BatchPool(jobs, {account.bucket!r})
""")
    return f"{file}:pool"


def test_job_definitions_and_queues_are_deployed_looked_at_and_removed_too(run, batch) -> None:
    assert run("aws", "status", batch).code == 1, "they are missing"
    [definition] = run("aws", "deploy", batch, "--json").document["functions"]
    status = run("aws", "status", batch, "--json")
    assert status.code == 0
    assert [(row["name"], row["state"]) for row in status.document["functions"]] == [
        (definition, "deployed"),
        ("cli-jobs", "deployed"),
    ]
    boto3.client("batch").update_job_queue(jobQueue="cli-jobs", state="DISABLED")
    assert run("aws", "status", batch).code == 1, "it takes no jobs any more"
    policies = run("aws", "policy", batch).document
    granted = {action for one in policies.values() for statement in one["Statement"] for action in statement["Action"]}
    assert {"batch:SubmitJob", "batch:RegisterJobDefinition", "batch:CreateJobQueue"} <= granted
    assert all("*" not in action for action in granted)
    assert run("aws", "destroy", batch, "--json").document["deleted"] == [definition, "cli-jobs"]
    assert {row["state"] for row in run("aws", "status", batch, "--json").document["functions"]} == {"missing"}


def test_a_queue_that_is_somebody_elses_and_missing_is_told_as_jobs_are_deployed(run, account, tmp_path) -> None:
    file = tmp_path / "theirs.py"
    file.write_text(
        "from prefect_slo import BatchJobs, BatchPool\n"
        f"pool = BatchPool(BatchJobs('theirs', 'image', prefix='cli-theirs'), {account.bucket!r})\n"
    )
    said = run("aws", "deploy", f"{file}:pool").out
    assert "theirs is missing, and not made here. Make it, or give BatchJobs a BatchQueue" in said
    run("aws", "destroy", f"{file}:pool")


@pytest.mark.parametrize("command", ["deploy", "status", "destroy"])
def test_what_keeps_aws_from_it_is_said_in_one_line(run, pool, command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name)
    forget_clients()
    result = run("aws", command, pool)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "no region is set. Give the pool a region=" in result.err
    forget_clients()


@pytest.mark.parametrize("entry", ["pools", "nowhere.py:pool", "{folder}/pools.py:nothing", "{folder}/pools.py:absent"])
def test_what_is_no_pool_is_refused_in_one_line(run, pool, entry) -> None:
    result = run("aws", "status", entry.format(folder=Path(pool).parent))
    assert result.code == 1
    assert len(result.err.strip().splitlines()) == 1

"""The least that callers, workers and deployers have to be allowed, as IAM policy documents."""

from __future__ import annotations

from typing import Any

from prefect_slo.aws.functions import WorkerFunctions
from prefect_slo.aws.s3 import S3Prefix

Statements = dict[str, list[dict[str, Any]]]


def policy(
    functions: WorkerFunctions,
    store: S3Prefix | None,
    besides: Statements | None = None,
    *,
    shared: S3Prefix | None = None,
) -> dict[str, Any]:
    """The least that the caller and the role of the functions need, as IAM policy documents by who needs them.

    Args:
        functions: The functions.
        store: Where large arguments and results go.
        besides: Statements for jobs on Batch.
        shared: What other pools may share, whose results its workers read.
    """
    region = functions.region or "*"
    mine = f"arn:aws:lambda:{region}:*:function:{functions.prefix}-*"
    caller = [
        allow(["lambda:InvokeFunction", "lambda:GetFunctionConcurrency"], mine),
        allow(["lambda:GetAccountSettings"], "*"),
    ]
    worker = [
        allow(["logs:CreateLogGroup", "logs:CreateLogStream", "logs:PutLogEvents"], f"arn:aws:logs:{region}:*:*"),
    ]
    deployer = [
        allow(
            [
                f"lambda:{action}"
                for action in (
                    "CreateFunction", "DeleteFunction", "GetFunction", "GetFunctionConfiguration", "ListTags",
                    "TagResource", "PutFunctionConcurrency",
                )
            ],
            mine,
        ),
        allow(["lambda:ListFunctions"], "*"),
        allow(["iam:PassRole"], functions.role or "arn:aws:iam::*:role/<role of the functions>"),
    ]  # fmt: skip
    needs: Statements = {"caller": caller, "worker": worker, "deployer": deployer}
    for who, statements in (*storage(store, shared=shared).items(), *(besides or {}).items()):
        needs[who] = [*needs[who], *statements]
    return documents(needs)


def storage(store: S3Prefix | None, *, shared: S3Prefix | None = None) -> Statements:
    """What callers, workers and deployers need of S3; workers read results of all pools that share what one was given.

    Args:
        store: The folder of the pool.
        shared: The folder that the pool was given.
    """
    if store is None:
        return {}
    bucket = f"arn:aws:s3:::{store.bucket}"
    objects, readable = (f"{bucket}/{folder.prefix.strip('/')}/*" for folder in (store, shared or store))
    keys = [allow(["kms:Decrypt", "kms:GenerateDataKey"], store.kms_key)] if store.kms_key else []
    return {
        "caller": [
            allow(["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"], objects),
            allow(["s3:ListBucket"], bucket),
            *keys,
        ],
        "worker": [
            allow(["s3:GetObject"], readable),
            allow(["s3:PutObject", "s3:AbortMultipartUpload"], objects),
            allow(["s3:ListBucket"], bucket),  # without it an object that is not there is "forbidden"
            *keys,
        ],
        "deployer": [
            allow(["s3:GetLifecycleConfiguration", "s3:PutLifecycleConfiguration", "s3:ListBucket"], bucket),
            allow(["s3:DeleteObject"], objects),
        ],
    }


def documents(needs: Statements) -> dict[str, Any]:
    """Statements as policy documents, by who needs them."""
    return {who: {"Version": "2012-10-17", "Statement": statements} for who, statements in needs.items()}


def allow(actions: list[str], resource: str | list[str]) -> dict[str, Any]:
    """A statement of an IAM policy."""
    return {"Effect": "Allow", "Action": actions, "Resource": resource}

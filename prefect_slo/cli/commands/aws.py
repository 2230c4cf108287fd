"""``aws``: worker functions of a Lambda pool, deployed, looked at and removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson
from prefect_slo.cli.output import print_json, print_line, print_table, working

if TYPE_CHECKING:
    from prefect_slo.runner.aws_pools import LambdaPool

aws = App(name="aws", help="Worker functions of a Lambda pool: deploy them, look at them, remove them.")
app.command(aws)

Pool = Annotated[
    str, Parameter(help="A LambdaPool, or a flow that has one, as package.module:name or path/to/file.py:name.")
]


@aws.command
def deploy(pool: Pool, /, *, json: AsJson = False) -> None:
    """Create the worker functions that there aren't, one for each memory size; what there is stays."""
    lambdas = _pool(pool)
    with working("deploying"):
        names = lambdas.deploy()
    if json:
        print_json({"functions": names})
        return
    for name in names:
        print_line(name)


@aws.command
def status(pool: Pool, /, *, json: AsJson = False) -> int:
    """Worker functions as the account has them; exit code 1 where one is missing or was changed."""
    from dataclasses import asdict

    rows = [asdict(row) for row in _pool(pool).status()]
    if json:
        print_json({"functions": rows})
    else:
        print_table(rows)
    return int(any(row["state"] in ("missing", "changed") for row in rows))


@aws.command
def destroy(
    pool: Pool,
    /,
    *,
    old: Annotated[bool, Parameter(help="Only functions of earlier versions and sizes, which nothing calls.")] = False,
    json: AsJson = False,
) -> None:
    """Delete the pool's worker functions, and what is stored under its prefix."""
    names = _pool(pool).destroy(only_old=old)
    if json:
        print_json({"deleted": names})
        return
    for name in names:
        print_line(f"deleted {name}")


@aws.command
def policy(pool: Pool, /) -> None:
    """The least that callers, functions and deployers may do, as IAM policy documents in JSON."""
    print_json(_pool(pool).policy())


def _pool(entrypoint: str) -> LambdaPool:
    """The pool that an entry point names.

    Raises:
        InvalidValue: It names something else, or a flow without a Lambda pool, or with several.
    """
    from prefect_slo.cli.flows import load_object
    from prefect_slo.errors import InvalidValue
    from prefect_slo.runner.aws_pools import LambdaPool

    found: Any = load_object(entrypoint)
    if isinstance(found, LambdaPool):
        return found
    elsewhere = getattr(getattr(found, "task_runner", None), "pools", {})
    lambdas = [pool for pool in elsewhere.values() if isinstance(pool, LambdaPool)]
    if len(lambdas) != 1:
        raise InvalidValue("pool", entrypoint, f"a LambdaPool, or a flow with one; it has {len(lambdas)}")
    return lambdas[0]

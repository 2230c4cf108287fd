"""``aws``: worker functions of a Lambda pool, deployed, looked at and removed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson
from prefect_slo.cli.output import print_json, print_line, print_table, working

if TYPE_CHECKING:
    from prefect_slo.runner.aws_pools import BatchPool, LambdaPool

aws = App(name="aws", help="Functions, jobs and queues of pools on AWS: deploy, look, remove. Prices. Files of SCAR.")
app.command(aws)

Pool = Annotated[
    str,
    Parameter(help="A LambdaPool or BatchPool, or a flow with one, as package.module:name or path/to/file.py:name."),
]


@aws.command
def deploy(pool: Pool, /, *, json: AsJson = False) -> None:
    """Create the worker functions, job definitions and queues that there aren't; what there is stays."""
    from prefect_slo.aws.refusals import QUEUE

    lambdas = _pool(pool)
    with working("deploying"), _plainly():
        names = lambdas.deploy()
        missing = [row.name for row in lambdas.status() if row.state == "missing"]
    if json:
        print_json({"functions": names, "missing": missing})
        return
    for name in names:
        print_line(name)
    for name in missing:
        print_line(f"{name} is missing, and not made here. {QUEUE}")


@aws.command
def status(pool: Pool, /, *, json: AsJson = False) -> int:
    """Functions, job definitions and queues as the account has them; exit code 1: one is missing or was changed."""
    from dataclasses import asdict

    wanted = _pool(pool)
    with _plainly():
        rows = [asdict(row) for row in wanted.status()]
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
    """Delete the pool's functions, job definitions and queues of its own, and what is stored under its prefix."""
    wanted = _pool(pool)
    with _plainly():
        names = wanted.destroy(only_old=old)
    if json:
        print_json({"deleted": names})
        return
    for name in names:
        print_line(f"deleted {name}")


@aws.command
def policy(pool: Pool, /) -> None:
    """The least that callers, functions and deployers may do, as IAM policy documents in JSON."""
    print_json(_pool(pool).policy())


@aws.command
def worker(
    folder: Annotated[Path, Parameter(help="Folder to write to; made where there is none.")],
    /,
) -> None:
    """Write the worker's code to a folder, to be copied into a container image for Lambda (LambdaPool(image=...))."""
    from prefect_slo.aws.packaging import HANDLER, write_worker

    written = write_worker(folder)
    print_line(f"{len(written)} files in {folder}. Copy them to ${{LAMBDA_TASK_ROOT}}; the handler is {HANDLER}.")


@aws.command
def prices(
    *,
    region: Annotated[str, Parameter(help="Region that the prices are to hold for.")] = "us-east-1",
    to: Annotated[
        Path | None,
        Parameter(help="Folder to write to; by default that of PREFECT_INTEGRATIONS_SLO_PRICES, which then is used."),
    ] = None,
    instances: Annotated[bool, Parameter(help="Ask for EC2 instances, too.")] = True,
    json: AsJson = False,
) -> None:
    """Read price lists anew from AWS's Pricing API, and write those that have changed. Needs pricing:GetProducts."""
    from datetime import date

    from prefect_slo.aws.refresh import charges_toml, refreshed
    from prefect_slo.blocks import PriceListBlock
    from prefect_slo.errors import InvalidValue
    from prefect_slo.pricing import OWN, PRICES, folders, price_list

    folder = to or folders()[0]
    if folder == PRICES:
        raise InvalidValue("--to", None, f"a folder, or {OWN} set to one")
    with working("asking AWS"), _plainly():
        found = refreshed(region, today := date.today(), instances=instances)
    rows = []
    (folder / "services").mkdir(parents=True, exist_ok=True)
    for name, fresh in found.lists.items():
        before = price_list(name)
        PriceListBlock.of(fresh).write(folder / f"{name}.toml")
        rows.append(
            {
                "list": name,
                "vCPU-hour": f"${3600 * before.vcpu_second:.4g} -> ${3600 * fresh.vcpu_second:.4g}",
                "GB-second": f"${before.gb_second:.4g} -> ${fresh.gb_second:.4g}",
                "file": str(folder / f"{name}.toml"),
            }
        )
    if found.charges:
        (folder / "services" / "aws.toml").write_text(charges_toml(found, region, today), encoding="utf-8")
    if json:
        print_json({"region": region, "lists": rows, "charges": dict(found.charges)})
    else:
        print_table(rows)


@aws.command
def fdl(
    file: Annotated[Path, Parameter(help="A Function Definition Language file of SCAR (.yaml).")],
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], help="Workflow file to write (.json).")] = None,
) -> None:
    """A workflow file from a Function Definition Language file: edges by paths, menus by execution mode."""
    import json

    from prefect_slo.aws.fdl import load_fdl

    document = load_fdl(file)[0].to_document()
    if output is None:
        print_json(document)
    else:
        output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _plainly() -> AbstractContextManager[None]:
    """What AWS refuses comes out as an error that says what to do."""
    from prefect_slo.aws.refusals import plainly

    return plainly()


def _pool(entrypoint: str) -> LambdaPool | BatchPool:
    """The pool that an entry point names.

    Raises:
        InvalidValue: It names something else, or a flow without a pool on AWS, or with several.
    """
    from prefect_slo.cli.flows import load_object
    from prefect_slo.errors import InvalidValue
    from prefect_slo.runner.aws_pools import BatchPool, LambdaPool

    found: Any = load_object(entrypoint)
    if isinstance(found, (LambdaPool, BatchPool)):
        return found
    elsewhere = getattr(getattr(found, "task_runner", None), "pools", None)
    ours = [pool for pool in (elsewhere or {}).values() if isinstance(pool, (LambdaPool, BatchPool))]
    if len(ours) != 1:
        have = f"this flow has {len(ours)}" if elsewhere is not None else f"this is of type {type(found).__name__}"
        raise InvalidValue("pool", entrypoint, f"a LambdaPool or BatchPool, or a flow with one; {have}")
    return ours[0]

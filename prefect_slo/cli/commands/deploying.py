"""``pin``, ``unpin``, ``approve``, ``rollback`` and ``register``: plans of deployments, and documents in the API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson, read_plan
from prefect_slo.cli.output import print_json, print_line, print_table, working

FlowName = Annotated[str, Parameter(help="Name of the flow.")]
Proposal = Annotated[
    str,
    Parameter(
        show_default=False,
        help="Name of the plan that was looked at, as its artifact and the report have it, or its first six "
        "characters; refused where another one waits by now. Without it, the one that waits is shown and taken.",
    ),
]
Deployment = Annotated[str, Parameter(help="Name of the deployment: flow/deployment.")]


@app.command
def pin(
    deployment: Deployment,
    /,
    *,
    plan: Annotated[Path | None, Parameter(help="Plan file (.json); by default the plan in force.")] = None,
    dry_run: Annotated[bool, Parameter(negative="", help="Change nothing; only print the job variables.")] = False,
    json: AsJson = False,
) -> None:
    """Have a deployment's runs follow one plan, in jobs of the size that it takes; a run may still have another."""
    from prefect_slo.loop.deploying import pin as pin_deployment

    chosen = read_plan(plan) if plan is not None else None
    told = pin_deployment(deployment, chosen, apply=not dry_run)
    if json or dry_run:
        print_json(
            {
                "deployment": told.deployment,
                "plan": f"slo-plan/{told.block}",
                "vcpus": told.size.vcpus,
                "memory_mb": told.size.memory_mb,
                "job_variables": told.job_variables,
                "applied": not dry_run,
            }
        )
        return
    size = f"in jobs of {told.size}" if told.sized else f"which takes {told.size}; its work pool sizes no jobs"
    if told.before == told.block:
        print_line(f"{deployment} follows slo-plan/{told.block} as before, {size}.")
    else:
        before = f", and slo-plan/{told.before} no more" if told.before else ""
        print_line(f"{deployment} follows slo-plan/{told.block} from its next run on{before}, {size}.")
    print_table([{"job variable": name, "value": value} for name, value in told.job_variables.items()])


@app.command
def unpin(deployment: Deployment, /) -> None:
    """Leave a deployment's runs to the plan in force again."""
    from prefect_slo.loop.deploying import unpin as unpin_deployment

    was = unpin_deployment(deployment)
    print_line(f"{deployment} {'is pinned no more' if was else 'was not pinned'}.")


@app.command
def approve(flow_name: FlowName, proposal: Proposal = "", /) -> None:
    """Put the plan in force that waits for approval."""
    from prefect_slo.cli.commands.planning import print_plan
    from prefect_slo.loop.guard import approve as approve_plan
    from prefect_slo.loop.guard import proposal as proposal_of

    if not proposal:
        waits = proposal_of(flow_name)
        proposal = waits.name
        print_line(f"Takes plan {proposal}: {waits.reason}.")
    print_plan(approve_plan(flow_name, proposal))
    print_line(f"In force for {flow_name} now.")


@app.command
def rollback(flow_name: FlowName, /) -> None:
    """Put the plan back in force that was before the one that is; that one is not taken again without approval."""
    from prefect_slo.cli.commands.planning import print_plan
    from prefect_slo.loop.guard import roll_back

    print_plan(roll_back(flow_name))
    print_line(f"In force for {flow_name} again.")


@app.command
def register(
    folder: Annotated[Path | None, Parameter(help="Folder with menus, prices, s3, pools, plans and profiles.")] = None,
    /,
    *,
    json: AsJson = False,
) -> None:
    """Register block types and store price lists, and the documents of a folder; running it again changes nothing."""
    from prefect_slo.blocks.registering import register as register_folder
    from prefect_slo.errors import InvalidValue

    if folder is not None and not folder.is_dir():
        raise InvalidValue("folder", str(folder), "a folder")
    with working("Storing documents"):
        found = register_folder(folder)
    if json:
        left_out = {name: list(v) for name, v in found.left_out.items()}
        print_json({"stored": found.stored, "kept": found.kept, "left_out": left_out})
        return
    print_table([{"stored": name} for name in found.stored])
    for name in found.kept:
        print_line(f"{name} was there and stays as it is.")
    for file, variables in found.left_out.items():
        print_line(f"{file} is left out: {', '.join(variables)} not set.")

"""``pools``: what a Prefect work pool makes of sizes, and how its template is extended for GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson
from prefect_slo.cli.output import print_json, print_line, print_table

pools = App(name="pools", help="Prefect work pools: job variables of sizes, and templates that take GPUs.")
app.command(pools)

Name = Annotated[str, Parameter(help="Name of a work pool.")]


@pools.command
def show(
    name: Name,
    /,
    *,
    vcpus: Annotated[list[float], Parameter(help="vCPUs of sizes to show.")] = [0.5, 1.0, 2.0, 4.0],  # noqa: B006
    memory_mb: Annotated[int, Parameter(help="Memory for each vCPU, in MB.")] = 2048,
    gpu: Annotated[float, Parameter(help="GPUs of each, or a share of one.")] = 0.0,
    gpu_memory_mb: Annotated[int, Parameter(help="Memory on its GPU of each, in MB.")] = 0,
    json: AsJson = False,
) -> None:
    """Job variables that sizes become on a pool; refused where the pool does not know them."""
    from prefect_slo.resources import Size
    from prefect_slo.runner.workpool.jobs import Jobs
    from prefect_slo.runner.workpool.sizing import checked, job_variables

    found = Jobs(name, None).work_pool()
    hardware = "gpu" if gpu else "cpu"
    sizes = [Size(v, max(int(v * memory_mb), 1), gpu, hardware, gpu_memory_mb=gpu_memory_mb) for v in vcpus]
    sizing = checked(found, None, sizes, {})
    rows = [{"size": str(size), "job_variables": job_variables(sizing, size)} for size in sizes]
    if json:
        print_json({"pool": name, "type": found.type, "sizes": rows})
    else:
        print_table(rows, title=f"{name} ({found.type})")
        if not any(row["job_variables"] for row in rows):
            print_line("Jobs of this type are not sized by variables: each holds its worker to the size by itself.")


@pools.command
def extend(
    name: Name,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], help="File to write the template to.")] = None,
    gpu_resource: Annotated[str, Parameter(help="Kubernetes' name of a GPU, or of a share of one.")] = "nvidia.com/gpu",
    turns: Annotated[int, Parameter(help="Of nvidia.com/gpu.shared: turns that its plugin makes of a device.")] = 0,
) -> None:
    """The pool's base job template with what sizes with a GPU need; the pool itself is left as it is."""
    import json

    from prefect_slo.runner.workpool.jobs import Jobs
    from prefect_slo.runner.workpool.sizing import extended

    template = extended(Jobs(name, None).work_pool(), gpu_resource=gpu_resource, turns=turns)
    if output is None:
        print_json(template)
        return
    output.write_text(json.dumps(template, indent=2) + "\n", encoding="utf-8")
    print_line(f"Look at {output}, then: prefect work-pool update {name!r} --base-job-template {output}")

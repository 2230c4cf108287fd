"""``gpus``: what GPUs worker processes of this machine may have, who holds them, and what containers would get."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson
from prefect_slo.cli.output import print_json, print_line, print_table


@app.command
def gpus(
    *,
    docker: Annotated[
        str | None, Parameter(help="A Docker engine to ask, too: unix:///path or tcp://host:port.")
    ] = None,
    json: AsJson = False,
) -> None:
    """GPUs of this machine, what of them is held, and whether shares are enforced."""
    from prefect_slo.runner.local.gpu_ledger import GpuLedger
    from prefect_slo.runner.local.gpus import devices, sharing
    from prefect_slo.settings import SLOSettings

    ledger = GpuLedger(devices(SLOSettings().named_gpus))
    used = ledger.used()
    rows = [
        {
            "device": device.name,
            "memory_mb": device.memory_mb,
            "cores": device.cores,
            "cores_held": used[device.name][0],
            "memory_held_mb": used[device.name][1],
        }
        for device in ledger.devices
    ]
    enforced = bool(rows) and sharing() == "mps"
    found: dict[str, Any] = {"devices": rows, "mps": enforced}
    if docker is not None:
        from prefect_slo.runner.workpool.docker_engine import probe

        engine = probe(docker)
        found["docker"] = {"version": engine.version, "nvidia": engine.nvidia, "devices": list(engine.devices)}
    if json:
        print_json(found)
        return
    if rows:
        print_table(rows, title="GPUs of this machine")
        print_line(
            "Shares are enforced by NVIDIA's MPS."
            if enforced
            else "Shares are not enforced: no MPS control daemon answers; sharers take turns on the whole device."
        )
    else:
        print_line("There is no GPU here: nvidia-smi lists none, and none is named in the settings.")
    if docker is not None:
        has = "may have GPUs" if found["docker"]["nvidia"] else "have no GPUs: NVIDIA's container toolkit is not there"
        print_line(f"Containers of the Docker engine {found['docker']['version']} {has}.")

"""``prices``: the price lists that menus may name."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from prefect_slo.cli.app import app
from prefect_slo.cli.inputs import AsJson
from prefect_slo.cli.output import print_json, print_table


@app.command
def prices(
    name: Annotated[
        str | None, Parameter(help="One price list, or a path to a .toml file; all shipped ones by default.")
    ] = None,
    /,
    *,
    json: AsJson = False,
) -> None:
    """Price lists: what a second of a worker costs, where and since when."""
    from dataclasses import asdict

    from prefect_slo.pricing import PRICES, price_list

    names = [name] if name is not None else sorted(path.stem for path in PRICES.glob("*.toml"))
    lists = [price_list(each) for each in names]
    if json:
        print_json({"prices": [asdict(each) for each in lists]})
        return
    print_table(
        [
            {
                "name": each.name,
                "vCPU-hour": f"${3600 * each.vcpu_second:.4g}",
                "GB-hour": f"${3600 * each.gb_second:.4g}",
                "GPU-hour": f"${3600 * each.gpu_second:.4g}",
                "million requests": f"${1e6 * each.request:.4g}",
                "billed by": f"{1000 * each.granularity_s:g} ms" if each.granularity_s else "any time",
                "region": each.region,
                "as of": each.as_of,
            }
            for each in lists
        ]
    )

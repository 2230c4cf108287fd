"""Register block types and store the documents of this folder: ``python blocks/register.py``.

It is ``prefect-slo register blocks``. Running it again changes nothing: documents are replaced by their own content.
Own menus go into ``menus/*.toml``, price lists into ``prices/*.toml``, S3 prefixes into ``s3/*.toml``, pools into
``pools/*.toml``, plan files into ``plans/*.json``, and bounds of flows into ``profiles/*.toml``.
"""

from __future__ import annotations

from pathlib import Path

from prefect.client.orchestration import get_client

from prefect_slo.blocks.registering import Registered
from prefect_slo.blocks.registering import register as register_folder

FOLDER = Path(__file__).parent


def register() -> Registered:
    """Register and store everything."""
    return register_folder(FOLDER)


if __name__ == "__main__":
    with get_client(sync_client=True) as client:
        print(f"Stored at {client.api_url}:")
    found = register()
    print("\n".join(f"  {name}" for name in found.stored))
    for name in found.kept:
        print(f"  {name} was there and stays as it is")
    for file, variables in found.left_out.items():
        print(f"  {file} is left out: {', '.join(variables)} not set")

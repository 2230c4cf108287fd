"""Register block types and store the documents of this folder: ``python blocks/register.py``.

Running it again changes nothing: documents are replaced by their own content. Own menus go into ``menus/*.toml``; own
price lists into ``prices/*.toml``, beside the ones that the package ships.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from prefect.client.orchestration import get_client

from prefect_slo.blocks import MenuBlock, PriceListBlock, S3PrefixBlock, SLOProfile
from prefect_slo.pricing import PRICES, PriceList

FOLDER = Path(__file__).parent


def register() -> list[str]:
    """Register and store everything; the slugs of what is stored, such as ``slo-menu/local``."""
    for block in (SLOProfile, MenuBlock, PriceListBlock, S3PrefixBlock):
        block.register_type_and_schema(_sync=True)
    stored = []
    for path in sorted(FOLDER.glob("menus/*.toml")):
        MenuBlock(document=tomllib.loads(path.read_text())).save(path.stem, overwrite=True, _sync=True)
        stored.append(f"slo-menu/{path.stem}")
    for path in sorted([*PRICES.glob("*.toml"), *FOLDER.glob("prices/*.toml")]):
        prices = PriceList.from_document(tomllib.loads(path.read_text()))
        PriceListBlock.of(prices).save(prices.name, overwrite=True, _sync=True)
        stored.append(f"slo-price-list/{prices.name}")
    return stored


if __name__ == "__main__":
    with get_client(sync_client=True) as client:
        print(f"Stored at {client.api_url}:")
    print("\n".join(f"  {name}" for name in register()))

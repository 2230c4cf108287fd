from __future__ import annotations

import pytest

from prefect_slo.blocks import MenuBlock, PriceListBlock
from prefect_slo.errors import InvalidValue, SloError
from prefect_slo.pricing import PriceList, price_list
from prefect_slo.resources import Size


def test_a_menu_block_is_a_menu():
    menu = MenuBlock(document={"workers": [1, 2], "vcpus": [0.5, 1], "memory_mb": [512]}).menu
    assert menu.workers == (1, 2)
    assert menu.sizes == (Size(0.5, 512), Size(1, 512))


def test_a_price_list_block_is_a_price_list():
    block = PriceListBlock.of(price_list("local"))
    assert block.prices == price_list("local")


@pytest.mark.parametrize("document", [{"workers": []}, {"colour": "red"}, {"workers": [0]}])
def test_a_menu_that_offers_nothing_or_nonsense_is_refused(document):
    with pytest.raises((SloError, ValueError)):
        MenuBlock(document=document)


def test_a_price_list_with_unknown_fields_is_refused():
    with pytest.raises((SloError, ValueError), match="fee"):
        PriceListBlock(document={"name": "mine", "fee": 1})


def test_blocks_come_back_from_the_server(prefect_server):
    MenuBlock(document={"workers": [3]}).save("three", overwrite=True)
    PriceListBlock.of(price_list("local")).save("local", overwrite=True)
    assert MenuBlock.load("three").menu.workers == (3,)
    assert PriceListBlock.load("local").prices == price_list("local")


def test_a_price_list_is_written_to_a_file_that_menus_can_name(tmp_path):
    prices = PriceList(
        "ours", vcpu_second=9e-06, gb_second=1e-06, granularity_s=0.001, as_of="2026-11-01", source='our "contract"',
        hardware={"t4 large": {"gpu_second": 1e-4}},
    )  # fmt: skip
    path = PriceListBlock.of(prices).write(tmp_path / "ours.toml")
    assert price_list(str(path)) == prices
    with pytest.raises(InvalidValue, match="toml"):
        PriceListBlock.of(prices).write(tmp_path / "ours")

"""Sizes, pools, menus and capacity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.errors import InvalidValue
from prefect_slo.resources import Capacity, Menu, Option, Pool, Size

SMALL, LARGE, GPU = Size(1, 1024), Size(4, 8192), Size(4, 16384, gpu=1, hardware="gpu")


def test_a_size_is_stored_as_plain_numbers_whatever_it_was_made_from() -> None:
    size = Size(np.int64(2), np.float64(2048.0), np.float32(0.5))  # type: ignore[arg-type]
    assert [type(value) for value in (size.vcpus, size.memory_mb, size.gpu)] == [float, int, float]
    assert size == Size(2, 2048, 0.5)
    assert str(Size(0.5, 512)) == "0.5 vCPU / 512 MB"
    assert str(Size(512 / 1769, 512)) == "0.289 vCPU / 512 MB"
    assert str(GPU) == "4 vCPU / 16384 MB + 1 gpu"


@given(
    workers=st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True),
    batch=st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True),
    knobs=st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(), min_size=1, max_size=3, unique=True)),
)
def test_options_are_the_product_of_the_dimensions(
    workers: list[int], batch: list[int], knobs: dict[str, list[int]]
) -> None:
    menu = Menu(workers=tuple(workers), sizes=(SMALL, LARGE), batch=tuple(batch), knobs=knobs)  # type: ignore[arg-type]
    settings = int(np.prod([len(values) for values in knobs.values()]))
    assert len(set(menu.options())) == len(menu.options()) == 2 * len(workers) * len(batch) * settings


def test_options_come_in_one_order_and_once() -> None:
    menu = Menu(workers=(2, 1, 2), sizes=(SMALL, SMALL), pools=(Pool(), Pool("gpu", (GPU,))))
    assert menu.options() == (Option(2, SMALL), Option(1, SMALL), Option(2, GPU, "gpu"), Option(1, GPU, "gpu"))


def test_a_pool_may_have_sizes_and_prices_of_its_own() -> None:
    menu = Menu(prices="local", sizes=(SMALL,), pools=(Pool(), Pool("cloud", (LARGE,), "aws-lambda-x86")))
    assert {option.size for option in menu.options() if option.pool == "cloud"} == {LARGE}
    assert menu.prices_of("default").name == "local"
    assert menu.prices_of("cloud").name == "aws-lambda-x86"


def test_a_size_that_would_look_free_on_a_list_of_gpus_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"pool\.gpus\.prices.*4 vCPU / 8192 MB, which would look free.*own"):
        Pool("gpus", (GPU, LARGE), "aws-ec2-gpu")
    with pytest.raises(InvalidValue, match=r"menu\.prices.*'aws-ec2-cpu'"):
        Menu(prices="aws-ec2-gpu-spot", sizes=(GPU, SMALL))
    apart = Menu(pools=(Pool("gpus", (GPU,), "aws-ec2-gpu"), Pool("cpus", (LARGE,), "aws-ec2-cpu")))
    assert all(apart.prices_of(o.pool).rate(o.vcpus, o.memory_mb, o.size.gpu) > 0 for o in apart.options())


@pytest.mark.parametrize("order", [("pool", "size"), ("size", "pool")])
def test_a_pin_of_pool_and_size_holds_in_either_order(order: tuple[str, str]) -> None:
    menu = Menu(workers=(1, 2), sizes=(SMALL, LARGE), pools=(Pool(), Pool("gpu", (GPU,))))
    choices = {"pool": "gpu", "size": LARGE}
    pinned = menu.pinned(**{name: choices[name] for name in order})
    assert {(option.pool, option.size) for option in pinned.options()} == {("gpu", LARGE)}
    assert {option.workers for option in pinned.options()} == {1, 2}


def test_pins_of_several_knobs_all_hold() -> None:
    menu = Menu(knobs={"resolution": (480, 720), "model": ("small", "large")})
    (option,) = menu.pinned(resolution=720, model="small").options()
    assert option.knobs == (("model", "small"), ("resolution", 720))


@pytest.mark.parametrize(
    "choices",
    [{"workers": "8"}, {"workers": 0}, {"batch": 1.5}, {"pool": "moon"}, {"size": 4}, {"colour": "red"}, {"model": []}],
)
def test_a_pin_that_no_menu_can_hold_is_refused(choices: dict[str, object]) -> None:
    with pytest.raises(InvalidValue):
        Menu(knobs={"model": ("small",)}).pinned(**choices)


def test_capacity_counts_all_workers_that_run_at_once() -> None:
    capacity = Capacity(vcpus=8, memory_mb=40_000, workers=6, gpu=2)
    assert capacity.fits(Option(2, GPU))
    assert not capacity.fits(Option(2, GPU), Option(1, SMALL))  # 9 vCPU
    assert not capacity.fits(Option(3, Size(1, 1024, gpu=1)))
    assert not capacity.fits(Option(7, SMALL))
    assert Capacity().fits(Option(10_000, GPU))


def test_fractions_that_add_up_to_the_capacity_fit() -> None:
    assert Capacity(vcpus=0.3).fits(Option(3, Size(0.1, 128)))


def test_a_pool_with_a_capacity_of_its_own_counts_apart() -> None:
    capacity = Capacity(vcpus=2, pools={"cloud": Capacity(workers=3)})
    here, there = Option(2, Size(1, 512)), Option(3, Size(8, 512), "cloud")
    assert capacity.fits(here, there)
    assert not capacity.fits(here, Option(1, Size(1, 512), "other"))
    assert not capacity.fits(there, there)
    with pytest.raises(InvalidValue):
        Capacity(pools={"cloud": capacity})


def test_worker_counts_of_a_pool_go_before_the_menus() -> None:
    menu = Menu(workers=(1, 2), pools=(Pool("a"), Pool("b", workers=(4,))))
    assert {(option.pool, option.workers) for option in menu.options()} == {("a", 1), ("a", 2), ("b", 4)}
    assert menu.worker_counts == {1, 2, 4}
    assert {option.workers for option in menu.pinned(workers=3).options()} == {3}

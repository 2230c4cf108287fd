"""Which idle leases are given back for one more: those that are in its way, no more than it takes, none for nothing."""

from __future__ import annotations

import pytest

from prefect_slo.control import StageRule
from prefect_slo.control.allowance import Allowance
from prefect_slo.resources import Capacity, Size

SMALL, LARGE = Size(1, 1024), Size(2, 1024)


@pytest.fixture
def full() -> tuple[Allowance, list[tuple[int, StageRule]]]:
    """Two leases of a pool with two vCPUs, and one elsewhere."""
    allowance = Allowance({"here": Capacity(vcpus=2)})
    held = [(1, StageRule("there", SMALL)), (2, StageRule("here", SMALL)), (3, StageRule("here", SMALL))]
    for _, rule in held:
        allowance.take(rule)
    return allowance, held


@pytest.mark.parametrize(("size", "given"), [(SMALL, [2]), (LARGE, [2, 3])])
def test_as_few_as_it_takes_are_given_back_and_of_its_own_pool(full, size, given):
    allowance, held = full
    assert allowance.in_the_way(StageRule("here", size), held) == given


def test_none_is_given_back_for_a_lease_that_does_not_fit_even_so(full):
    allowance, held = full
    assert allowance.in_the_way(StageRule("here", LARGE), held[:2]) is None
    assert allowance.in_the_way(StageRule("here", SMALL), held) == [2], "nothing was freed by asking"


def test_none_is_in_the_way_where_there_is_room(full):
    allowance, held = full
    assert allowance.in_the_way(StageRule("there", LARGE), held) == []


def test_a_lease_of_its_task_is_given_back_for_the_limit_of_the_task_on_whatever_pool():
    allowance, rule = Allowance({}), StageRule("here", SMALL, task="crop", together=1)
    held = [(1, StageRule("here", SMALL, task="join")), (2, StageRule("there", SMALL, task="crop", together=1))]
    for _, taken in held:
        allowance.take(taken)
    assert allowance.in_the_way(rule, held) == [2]
    assert not allowance.pool_is_full(rule), "it is the task that has no more"


def test_a_pool_that_has_no_room_is_full(full):
    allowance, _ = full
    assert allowance.pool_is_full(StageRule("here", SMALL))
    assert not allowance.pool_is_full(StageRule("there", SMALL))

"""What a pool that grows is told of the stages to come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.control import StageRule
from prefect_slo.control.need import Need, Needs
from prefect_slo.resources import Size

SMALL, LARGE = Size(1, 512), Size(4, 4096)
RULES = {
    "split": StageRule("dask", SMALL, 1),
    "train": StageRule("dask", LARGE, 8),
    "here": StageRule("process", SMALL, 4),
    "free": StageRule("dask", SMALL, None),
}


def test_stages_that_wait_are_told_of_before_their_turn():
    needs = Needs()
    needs.submitted("split", [1], ready=True)
    needs.submitted("train", range(10, 30), ready=False)
    assert needs.of("dask", RULES) == Need(((SMALL, 1),), ((LARGE, 8),))
    needs.settled([1])
    needs.ready(range(10, 13))
    assert needs.of("dask", RULES) == Need(((LARGE, 3),), ((LARGE, 8),)), "no more than there is work for"
    needs.ready(range(13, 30))
    needs.settled(range(10, 28))
    assert needs.of("dask", RULES) == Need(((LARGE, 2),), ())
    needs.settled([28, 29])
    assert needs.of("dask", RULES) == Need()


def test_other_pools_and_stages_that_no_plan_sizes_do_not_count():
    needs = Needs()
    needs.submitted("here", [1], ready=True)
    needs.submitted("free", [2], ready=True)
    assert needs.of("dask", RULES) == Need()
    assert needs.of("process", RULES) == Need(((SMALL, 1),), ())


@given(st.lists(st.tuples(st.sampled_from(["ready", "settled"]), st.integers(0, 9)), max_size=40))
def test_whatever_happens_nothing_is_needed_in_the_end(happenings):
    needs = Needs()
    needs.submitted("train", range(5), ready=True)
    needs.submitted("split", range(5, 10), ready=False)
    for what, item in happenings:
        (needs.ready if what == "ready" else needs.settled)([item])
        found = needs.of("dask", RULES)
        assert all(0 < n <= 8 for _, n in (*found.now, *found.next))
    needs.settled(range(10))
    assert needs.of("dask", RULES) == Need()

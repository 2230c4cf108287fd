"""Which settings a sweep measures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.loop.sweep import (
    ON_THREADS,
    SETTINGS,
    design,
    fallback_options,
    noise_of,
    spread,
    wanted_repeats,
)
from prefect_slo.observation import StageRuns
from prefect_slo.resources import Menu, Option, Pool, Size
from prefect_slo.workflow import Edge, Stage, Workflow


def test_every_setting_of_a_small_menu_is_measured_as_often_as_asked(workflow: Workflow) -> None:
    found = design(workflow, None, repeats=3, seed=0)
    assert Counter(found.todo["train"]) == dict.fromkeys(workflow["train"].menu.options(), 3)
    only = workflow["load"].menu.options()[0]
    assert Counter(found.todo["load"]) == {only: 4}, "one setting alone takes four rows to tell noise from effect"
    assert found.runs == 18, "one option of every stage at a time"


def test_what_was_measured_is_not_measured_again(workflow: Workflow, rows: Callable[..., StageRuns]) -> None:
    assert design(workflow, rows(repeats=2), repeats=2, seed=0).runs == 0
    half = design(workflow, rows(repeats=1), repeats=2, seed=0)
    assert Counter(half.todo["train"]) == dict.fromkeys(workflow["train"].menu.options(), 1)


def test_only_a_new_stage_is_measured(workflow: Workflow, rows: Callable[..., StageRuns]) -> None:
    grown = replace(workflow, stages=(*workflow.stages, Stage("test", (Edge("train"),), workflow["train"].menu)))
    found = design(grown, rows(repeats=2), repeats=2, seed=0)
    assert set(found.todo) == {"test"}
    usual = fallback_options(grown, {})
    assert {found.setting(run, usual)["train"] for run in range(found.runs)} == {usual["train"]}


def test_rows_of_other_hardware_do_not_count(workflow: Workflow, rows: Callable[..., StageRuns]) -> None:
    measured = rows(repeats=2)
    elsewhere = StageRuns({**measured.columns, "hardware": measured["hardware"].copy()})
    elsewhere.columns["hardware"][:] = "thread"
    assert design(workflow, elsewhere, repeats=2, seed=0).runs == 12


def test_the_seed_decides_the_order_and_stages_do_not_go_together(workflow: Workflow) -> None:
    twins = replace(workflow, stages=tuple(replace(workflow["train"], name=n, after=()) for n in "ab"))
    first, again = design(twins, None, repeats=2, seed=1), design(twins, None, repeats=2, seed=1)
    assert first == again
    assert first.todo["a"] != first.todo["b"]
    assert first != design(twins, None, repeats=2, seed=2)


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=8, unique=True),
    st.lists(st.sampled_from((0.5, 1.0, 2.0, 4.0, 8.0, 16.0)), min_size=1, max_size=6, unique=True),
    st.integers(2, 12),
)
def test_a_large_menu_is_spread_over_its_corners(workers: list[int], vcpus: list[float], settings: int) -> None:
    menu = Menu(workers=tuple(sorted(workers)), sizes=tuple(Size(v, 1024) for v in sorted(vcpus)))
    options = menu.options()
    chosen = spread(Stage("s", menu=menu), settings)
    assert len(chosen) == len(set(chosen)) == min(settings, len(options))
    assert {options[0], options[-1]} <= set(chosen)
    for dimension in ("workers", "vcpus"):
        if len({getattr(option, dimension) for option in options}) > 1:
            assert len({getattr(option, dimension) for option in chosen}) > 1, "each dimension varies"


def test_what_may_run_on_threads_is_measured_there_too_at_two_settings_more() -> None:
    threads = Pool("thread", (Size(1, 1024, hardware="thread"),))
    sizes = tuple(Size(v, 1024) for v in (1, 2, 4, 8))
    both = Menu(workers=(1, 2, 4, 8), sizes=sizes, pools=(Pool("process"), threads))
    chosen = spread(Stage("s", menu=both), SETTINGS)
    assert Counter(option.pool for option in chosen) == {"process": SETTINGS, "thread": ON_THREADS}
    assert [option.workers for option in chosen if option.pool == "thread"] == [1, 8]
    alone = Menu(workers=(1, 2, 4, 8), pools=(threads,))
    assert len(spread(Stage("s", menu=alone), SETTINGS)) == 4
    one = Menu(workers=(1,), sizes=(Size(1, 1024),), pools=(Pool("process"), threads))
    found = design(Workflow("flow", (Stage("s", menu=one),)), None, repeats=2, seed=0)
    assert Counter(option.pool for option in found.todo["s"]) == {"process": 4, "thread": 2}


def test_noisy_runs_call_for_more_of_them_and_steady_ones_for_none(
    workflow: Workflow, rows: Callable[..., StageRuns]
) -> None:
    def noisy(sigma: float, seed: int = 0) -> StageRuns:
        measured = rows(repeats=4)
        factors = np.exp(sigma * np.random.default_rng(seed).standard_normal(len(measured)))
        return StageRuns({**measured.columns, "wall_s": measured["wall_s"] * factors}, measured.extra)

    bare = noise_of(workflow, rows(repeats=4))
    assert noise_of(workflow, noisy(0.2)) == pytest.approx(np.hypot(0.2, bare), rel=0.35)
    assert wanted_repeats(workflow, noisy(0.3), repeats=2, most=6) == 6
    assert wanted_repeats(workflow, rows(repeats=1), repeats=2, most=6) == 2
    assert wanted_repeats(workflow, None, repeats=2, most=6) == 2
    assert wanted_repeats(workflow, noisy(0.3), repeats=2, most=2) == 2
    asked = [wanted_repeats(workflow, noisy(sigma), repeats=2, most=100) for sigma in (0.05, 0.1, 0.2)]
    assert asked == sorted(asked)
    assert asked[2] > 2 * asked[1]


def test_each_pool_and_knob_gets_its_share() -> None:
    pools = (Pool("cpu", (Size(1, 1024),)), Pool("gpu", (Size(1, 1024, 1.0, "gpu"),)))
    menu = Menu(workers=tuple(range(1, 9)), pools=pools, knobs={"resolution": (480, 720)})
    chosen = spread(Stage("s", menu=menu), SETTINGS)
    assert len({(option.pool, option.knobs) for option in chosen}) == 4


def test_stages_with_nothing_to_measure_keep_to_the_plan_in_force(workflow: Workflow) -> None:
    options = workflow["train"].menu.options()
    assert fallback_options(workflow, {"train": options[2]})["train"] == options[2]
    gone = Option(64, Size(1, 1024))
    assert fallback_options(workflow, {"train": gone})["train"] == options[-1]


@pytest.fixture
def knobbed(workflow: Workflow) -> Workflow:
    train = workflow["train"]
    menu = replace(train.menu, knobs={"resolution": (480, 720)})
    return replace(workflow, stages=(workflow["load"], replace(train, menu=menu)))


def with_knob(measured: StageRuns, resolution: int, factor: float, run: str) -> StageRuns:
    """The rows at a value of the knob, with a feature of the input in a column of its own."""
    n = len(measured)
    columns = {
        **measured.columns,
        "wall_s": measured["wall_s"] * np.where(measured["stage"] == "train", factor, 1.0),
        "run_id": np.array([f"{run}-{name}" for name in measured["run_id"]]),
    }
    extra = {"resolution": np.full(n, resolution, dtype=object), "pages": np.arange(n, dtype=float)}
    return StageRuns(columns, {name: column.astype(object) for name, column in extra.items()})


def test_the_effect_of_a_knob_is_no_noise(knobbed: Workflow, rows: Callable[..., StageRuns]) -> None:
    parts = [with_knob(rows(repeats=2, seed=k), value, value / 480, str(k)) for k, value in enumerate((480, 720))]
    assert noise_of(knobbed, parts[0].concat(parts[1])) < 0.05


def test_features_of_the_input_do_not_make_a_measured_setting_another(
    knobbed: Workflow, rows: Callable[..., StageRuns]
) -> None:
    left = design(knobbed, with_knob(rows(repeats=2), 480, 1.0, "a"), repeats=2, seed=0).todo["train"]
    assert {dict(option.knobs)["resolution"] for option in left} == {720}

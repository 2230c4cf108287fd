"""What may be chosen for a stage on this machine."""

from __future__ import annotations

import pytest

from prefect_slo.blocks import MenuBlock
from prefect_slo.declaration import Declaration
from prefect_slo.errors import InvalidValue, UnknownPrices
from prefect_slo.loop import menus
from prefect_slo.loop.menus import MenuSettings, capacity_of, moving_much, stage_menu, with_menus
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.resources import Menu, Size
from prefect_slo.workflow import Edge, Stage, Workflow


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six vCPUs and 12,000 MB, wherever the tests run."""
    monkeypatch.setattr(menus, "usable_vcpus", lambda: 6.0)
    monkeypatch.setattr(menus, "usable_memory_mb", lambda: 12_000)


def test_by_default_a_menu_has_powers_of_two_up_to_the_machine() -> None:
    menu = stage_menu(MenuSettings())
    assert menu.workers == (1, 2, 4, 6)
    assert [size.vcpus for size in menu.sizes] == [1, 2, 4, 6]
    assert [size.memory_mb for size in menu.sizes] == [2000, 4000, 8000, 12000], "memory goes with vCPUs"
    assert [pool.name for pool in menu.pools] == ["process"]
    assert capacity_of().vcpus == 6


def test_the_decorator_narrows_and_the_task_goes_before_it() -> None:
    settings = MenuSettings.of({"workers": (1, 2), "vcpus": 2, "memory_mb": "1GB"})
    assert stage_menu(settings) == Menu(
        workers=(1, 2), sizes=(Size(2, settings.memory_mb[0]),), pools=stage_menu(settings).pools
    )
    assert stage_menu(settings, Declaration(menu={"workers": (4,)})).workers == (4,)


def test_a_declared_concurrency_is_never_exceeded() -> None:
    assert stage_menu(MenuSettings(), Declaration(concurrency=3)).workers == (1, 2, 3)
    assert stage_menu(MenuSettings(workers=(4, 8)), Declaration(concurrency=3)).workers == (3,)


def test_a_memory_floor_drops_smaller_sizes() -> None:
    assert [s.memory_mb for s in stage_menu(MenuSettings(), Declaration(memory_mb=5000)).sizes] == [8000, 12000]
    assert stage_menu(MenuSettings(), Declaration(memory_mb=20_000)).sizes == (Size(6, 20_000),)


def test_pins_hold_a_choice_and_take_the_rest_from_the_menu() -> None:
    options = stage_menu(MenuSettings(), Declaration(pins={"workers": 3, "vcpus": 4})).options()
    assert [(option.workers, option.size) for option in options] == [(3, Size(4, 8000))]


@pytest.mark.parametrize(
    ("declared", "on_threads"),
    [(Declaration(isolation="thread"), False), (Declaration(pool="thread"), False), (Declaration(), True)],
)
def test_threads_have_one_size_and_are_kept_apart_from_processes(declared: Declaration, on_threads: bool) -> None:
    menu = stage_menu(MenuSettings(), declared, on_threads=on_threads)
    assert [(size.vcpus, size.hardware) for size in menu.sizes] == [(1, "thread")]
    assert [pool.name for pool in menu.pools] == ["thread"]


def moved(stage: str, *, moved_s: float, compute_s: float, megabytes: float) -> StageRun:
    """A row of two workers that read for that long."""
    row = {"read_s": moved_s, "compute_s": compute_s, "write_s": 0.0, "bytes_in": 1e6 * megabytes, "bytes_out": 0.0}
    return StageRun("r", stage, 2, 1024, 1.0, moved_s + compute_s, **row)


def test_threads_are_offered_where_moving_bytes_takes_long() -> None:
    found = StageRuns.of(
        (
            moved("heavy", moved_s=0.4, compute_s=0.5, megabytes=100),
            moved("tiny", moved_s=0.4, compute_s=0.5, megabytes=0.1),
            moved("light", moved_s=0.01, compute_s=0.5, megabytes=100),
            StageRun("r", "unknown", 2, 1024, 1.0, 3.0),
        )
    )
    assert moving_much(found) == {"heavy"}
    assert moving_much(found.select(found["stage"] == "nowhere")) == frozenset()
    plan = Plan("flow", None, {"unknown": StagePlan(1, Size(1, 1024, hardware="thread"), "thread")})
    assert moving_much(found, plan) == {"heavy", "unknown"}, "what runs on threads doesn't show what it saves"


def test_a_stage_that_moves_much_chooses_between_processes_and_threads_unless_that_is_pinned() -> None:
    stages = tuple(Stage(name, fanout="given", items=9) for name in ("open", "pinned", "pooled", "unpickled"))
    declared = {"pinned": Declaration(isolation="process"), "pooled": Declaration(pins={"pool": "process"})}
    found = with_menus(
        Workflow("flow", stages), MenuSettings(), declared, frozenset({"unpickled"}),
        or_threads=frozenset(stage.name for stage in stages),
    )  # fmt: skip
    offered = {stage.name: [pool.name for pool in stage.menu.pools] for stage in found.stages}
    assert offered == {"open": ["process", "thread"], "pinned": ["process"], "pooled": ["process"],
                       "unpickled": ["thread"]}  # fmt: skip
    threads = [option for option in found["open"].menu.options() if option.pool == "thread"]
    assert [(option.workers, option.size.vcpus) for option in threads] == [(1, 1), (2, 1), (4, 1), (6, 1)]


def test_knobs_are_on_the_menu_and_batches_where_the_task_takes_them() -> None:
    menu = stage_menu(MenuSettings(batch=(1, 8)), Declaration(batched=True, knobs={"depth": (1, 2)}))
    assert (menu.knobs, menu.batch) == ({"depth": (1, 2)}, (1, 8))
    assert stage_menu(MenuSettings(batch=(1, 8))).batch == (1,)
    assert stage_menu(MenuSettings(batch=(1, 8)), Declaration(batched=True, pins={"batch": 4})).batch == (4,)


def test_what_runs_one_item_at_a_time_has_one_worker() -> None:
    stages = (
        Stage("one", fanout="given", items=1),
        Stage("loop", (Edge("one"),), fanout="given", items=9, sequential=True),
        Stage("many", (Edge("loop"),), fanout="given", items=9),
    )
    found = with_menus(Workflow("flow", stages), MenuSettings(), {"many": Declaration(menu={"workers": (2, 3)})})
    assert [stage.menu.workers for stage in found.stages] == [(1,), (1,), (2, 3)]
    assert found.capacity.vcpus == 6


@pytest.mark.parametrize(
    "menu",
    [
        {"wokers": 2},
        {"workers": 0},
        {"workers": "two"},
        {"workers": ()},
        {"vcpus": -1},
        {"memory_mb": "lots"},
        {"batch": 1.5},
        [1, 2],
    ],
)
def test_a_menu_that_is_none_is_refused(menu: object) -> None:
    with pytest.raises(InvalidValue):
        MenuSettings.of(menu)  # type: ignore[arg-type]


def test_prices_that_do_not_exist_are_refused_at_once() -> None:
    with pytest.raises(UnknownPrices):
        MenuSettings.of({"prices": "free-lunch"})


def test_a_flow_may_choose_from_a_stored_menu(prefect_server: str) -> None:
    sizes = [{"vcpus": 1.0, "memory_mb": 512}, {"vcpus": 2.0, "memory_mb": 4096}]
    MenuBlock(document={"workers": [1, 3], "sizes": sizes}).save("stored-menu", overwrite=True)
    settings = MenuSettings.of("stored-menu")
    menu = stage_menu(settings)
    assert (menu.workers, menu.sizes) == ((1, 3), (Size(1, 512), Size(2, 4096)))
    narrowed = stage_menu(settings, Declaration(menu={"workers": 2, "vcpus": 1}))
    assert (narrowed.workers, {size.vcpus for size in narrowed.sizes}) == ((2,), {1.0})


def test_a_stored_menu_is_read_when_it_is_needed_and_said_where_it_is_missing(prefect_server: str) -> None:
    settings = MenuSettings.of("no-such-menu")
    with pytest.raises(InvalidValue, match=r"no-such-menu.*register\.py"):
        stage_menu(settings)
    MenuBlock(document={"workers": [1], "knobs": {"depth": [1, 2]}}).save("menu-with-knobs", overwrite=True)
    with pytest.raises(InvalidValue, match="slo_task"):
        stage_menu(MenuSettings.of("menu-with-knobs"))

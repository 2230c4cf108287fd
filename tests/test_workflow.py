"""The stage graph, its constraints, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.constraint import Constraint
from prefect_slo.errors import InvalidValue, InvalidWorkflow, UnknownStage
from prefect_slo.placement import Device, Interference
from prefect_slo.resources import Capacity, Menu, Option, Pool, Size
from prefect_slo.workflow import Edge, Stage, Workflow, chain

DIAMOND = Workflow(
    "diamond",
    (
        Stage("join", (Edge("left"), Edge("right", "item"))),
        Stage("left", (Edge("source"),)),
        Stage("right", (Edge("source"),)),
        Stage("source"),
    ),
)

names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)
sizes = st.builds(Size, st.floats(0.1, 64), st.integers(128, 10240), st.sampled_from([0.0, 0.5, 2.0]), names)
knob_values = st.one_of(st.booleans(), st.integers(-(2**53), 2**53), st.floats(-1e9, 1e9), st.text(max_size=5))


def some(values: st.SearchStrategy, most: int = 3) -> st.SearchStrategy:  # type: ignore[type-arg]
    return st.lists(values, min_size=1, max_size=most).map(tuple)


menus = st.builds(
    Menu,
    prices=st.sampled_from(["local", "aws-lambda-x86"]),
    workers=some(st.integers(1, 100)),
    sizes=some(sizes),
    pools=st.lists(
        st.builds(Pool, names, st.just(()) | some(sizes), st.none() | st.just("local")),
        min_size=1, max_size=3, unique_by=lambda pool: pool.name,
    ).map(tuple),
    batch=some(st.integers(1, 100)),
    knobs=st.dictionaries(names.filter(lambda n: n not in ("size", "pool", "batch", "workers")), some(knob_values)),
)  # fmt: skip


@st.composite
def workflows(draw: st.DrawFn) -> Workflow:
    order = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    stages = []
    for position, name in enumerate(order):
        parents = draw(st.lists(st.sampled_from(order[:position]), unique=True)) if position else []
        stages.append(
            Stage(
                name,
                tuple(Edge(parent, draw(st.sampled_from(["all", "item"]))) for parent in parents),
                draw(menus),
                draw(st.sampled_from(["given", "planned"])),
                draw(st.none() | st.integers(0, 1000)),
                draw(st.floats(0.01, 1.0)),
                draw(st.booleans()),
                draw(st.booleans()),
            )
        )
    constraint = st.builds(
        Constraint,
        st.sampled_from(order),
        st.sampled_from(["workers", "memory_mb", "vcpus", "batch"]),
        st.sampled_from(["<=", ">=", "=="]),
        st.floats(0, 1e12) | st.sampled_from(order),
    )
    capacity = st.builds(Capacity, st.none() | st.floats(0.5, 1e4), workers=st.none() | st.integers(1, 9999))
    constraints = tuple(draw(st.lists(constraint, max_size=3)))
    return Workflow(draw(names), tuple(draw(st.permutations(stages))), constraints, draw(capacity))


@given(workflows())
def test_a_document_reads_back_to_an_equal_workflow(workflow: Workflow) -> None:
    assert Workflow.from_document(json.loads(json.dumps(workflow.to_document()))) == workflow


@given(workflows())
def test_the_order_puts_every_stage_after_its_parents(workflow: Workflow) -> None:
    position = {name: i for i, name in enumerate(workflow.order)}
    assert len(position) == len(workflow.stages)
    for stage in workflow.stages:
        assert all(position[parent] < position[stage.name] for parent in stage.parents)
        assert all(stage.name in workflow.children(parent) for parent in stage.parents)


@given(workflows(), st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_names(workflow: Workflow, random) -> None:  # type: ignore[no-untyped-def]
    numbers = list(range(len(workflow.stages)))
    random.shuffle(numbers)
    new = {stage.name: f"s{number}" for stage, number in zip(workflow.stages, numbers, strict=True)}
    renamed = Workflow(
        "renamed",
        tuple(Stage(new[s.name], tuple(Edge(new[e.parent], e.kind) for e in s.after)) for s in workflow.stages),
    )
    assert renamed.order == tuple(new[name] for name in workflow.order)


def test_a_stage_is_found_by_name() -> None:
    assert DIAMOND.order == ("source", "left", "right", "join")
    assert DIAMOND["join"].parents == ("left", "right")
    assert DIAMOND.children("source") == ("left", "right")
    assert "left" in DIAMOND
    assert 3 not in DIAMOND
    with pytest.raises(UnknownStage, match="join, left, right, source"):
        DIAMOND["middle"]


def test_a_chain_links_each_stage_to_the_one_before() -> None:
    workflow = Workflow("etl", chain("extract", "transform", "load", kind="item"))
    assert [edge for stage in workflow.stages for edge in stage.after] == [
        Edge("extract", "item"),
        Edge("transform", "item"),
    ]


def test_a_pin_changes_one_stage_and_leaves_the_rest() -> None:
    workflow = Workflow("etl", chain("extract", "load", menu=Menu(workers=(1, 2, 4))))
    pinned = workflow.pin("load", workers=2)
    assert pinned["load"].menu.workers == (2,)
    assert pinned["extract"] is workflow["extract"]
    with pytest.raises(UnknownStage):
        workflow.pin("laod", workers=2)


def test_two_thousand_stages_are_checked_in_linear_time() -> None:
    workflow = Workflow("long", chain(*(f"stage-{i}" for i in range(2000))))
    assert workflow.order[-1] == "stage-1999"


@pytest.mark.parametrize(
    ("text", "workers", "holds"),
    [
        ("merge.workers <= train.workers", (4, 8), True),
        ("merge.workers <= train.workers", (8, 4), False),
        ("merge.workers = train.workers", (4, 4), True),
        ("merge.workers >= 2", (1, 1), False),
        (" merge.workers<=1e1 ", (8, 1), True),
        ("merge.vcpus == .5", (1, 1), False),
    ],
)
def test_a_constraint_relates_two_choices_or_one_and_a_number(text: str, workers: tuple[int, int], holds: bool) -> None:
    constraint = Constraint.parse(text)
    options = dict(zip(("merge", "train"), (Option(n, Size(1, 1024)) for n in workers), strict=True))
    assert constraint.holds(options) is holds
    assert Constraint.parse(str(constraint)) == constraint
    assert constraint.holds({})


def test_stages_with_dots_in_their_names_can_be_constrained() -> None:
    assert Constraint.parse("a.b.workers <= c.d.workers").stages == ("a.b", "c.d")


TOML = """
name = "ml"
[menu]
prices = "aws-lambda-x86"
workers = [4, 8]
memory_mb = [1769, 3538]
[[stages]]
name = "pca"
menu.workers = [1]
[[stages]]
name = "train"
after_items = ["pca"]
fanout = "given"
items = 32
menu.vcpus = [1, 2, 4]
[[stages]]
name = "test"
after = ["pca", "train"]
probability = 0.5
menu.sizes = [{ vcpus = 2, gpu = 1, hardware = "t4" }]
menu.pools = ["default", { name = "gpu", vcpus = [4], memory_mb = [8192], prices = "local" }]
"""


def test_a_toml_file_becomes_a_workflow(tmp_path: Path) -> None:
    (tmp_path / "ml.toml").write_text(TOML)
    workflow = Workflow.load(tmp_path / "ml.toml")
    assert workflow["pca"].menu.workers == (1,)
    assert workflow["pca"].menu.sizes == (Size(1.0, 1769), Size(2.0, 3538))
    assert workflow["train"].after == (Edge("pca", "item"),)
    assert [size.memory_mb for size in workflow["train"].menu.sizes] == [1769, 3538, 7076]
    assert workflow["train"].menu.workers == (4, 8)
    assert workflow["test"].menu.sizes == (Size(2, 3538, 1, "t4"),)
    assert workflow["test"].menu.pool("gpu") == Pool("gpu", (Size(4, 8192, hardware="gpu"),), "local")


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "ml.toml").write_text(TOML)
    workflow = Workflow.load(str(tmp_path / "ml.toml"))
    (tmp_path / "ml.JSON").write_text(json.dumps(workflow.to_document()))
    assert Workflow.load(tmp_path / "ml.JSON") == workflow


def test_a_price_list_named_by_a_relative_path_lies_beside_the_workflow_file(tmp_path: Path) -> None:
    (tmp_path / "ours.toml").write_text('name = "ours"\nvcpu_second = 7\n')
    (tmp_path / "flow.toml").write_text('menu.prices = "ours.toml"\n[[stages]]\nname = "a"\n')
    assert Workflow.load(tmp_path / "flow.toml")["a"].menu.prices_of("default").vcpu_second == 7.0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.toml", None),
        ("broken.toml", b"name = "),
        ("broken.json", b"{"),
        ("toml.json", b'name = "a"'),
        ("latin.toml", b"name = '\xe9'"),
        ("deep.json", b"[" * 100_000),
        ("list.json", b"[]"),
        ("folder.toml", "folder"),
    ],
)
def test_a_file_that_is_no_workflow_is_refused(tmp_path: Path, name: str, content: bytes | str | None) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content:
        (tmp_path / name).mkdir()
    with pytest.raises(InvalidWorkflow, match="workflow is"):
        Workflow.load(tmp_path / name)


def test_a_cycle_is_shown_as_a_path() -> None:
    with pytest.raises(InvalidWorkflow, match=r"a -> b -> a|b -> a -> b"):
        Workflow("loop", (Stage("a", (Edge("b"),)), Stage("b", (Edge("a"),))))


def test_an_edge_of_both_kinds_to_one_parent_is_refused() -> None:
    with pytest.raises(InvalidValue, match="each parent once"):
        Stage("b", (Edge("a", "all"), Edge("a", "item")))


def test_pools_with_workers_and_a_capacity_of_their_own_are_read_back() -> None:
    pool = Pool("cloud", (Size(0.5, 512, hardware="cloud"),), "aws-lambda-x86", (1, 16))
    stage = Stage("a", menu=Menu(pools=(Pool("process"), pool)))
    workflow = Workflow("w", (stage,), capacity=Capacity(vcpus=4, pools={"cloud": Capacity(workers=16)}))
    assert Workflow.from_document(workflow.to_document()) == workflow
    with pytest.raises(InvalidValue, match="capacity"):
        Workflow.from_document({"stages": [], "capacity": {"pools": {"cloud": {"wokers": 1}}}})


def test_gpus_of_a_capacity_are_read_back() -> None:
    devices = (Device("0", 16_384), Device("1", 8_192, cores=0.5))
    sharing = Capacity(gpu_devices=devices, gpu_slowdown=Interference({2: 1.9, 4: 3.8}), pools={"ray": Capacity(gpu=2)})
    stage = Stage("a", menu=Menu(sizes=(Size(1, 512, 0.25, "gpu", 4_096),)))
    for capacity in (sharing, Capacity(gpu_devices=()), Capacity(pools={"far": Capacity(gpu_devices=devices)})):
        workflow = Workflow("w", (stage,), capacity=capacity)
        document = json.loads(json.dumps(workflow.to_document()))
        assert Workflow.from_document(document) == workflow


@pytest.mark.parametrize(
    "capacity",
    [
        {"gpu_devices": [{"name": "0"}]},
        {"gpu_devices": [{"name": "0", "memory_mb": 0}]},
        {"gpu_devices": [{"name": "0", "memory_mb": 1, "colour": "red"}]},
        {"gpu_slowdown": {"2": 0.5}},
        {"gpu_slowdown": {"two": 2.0}},
    ],
)
def test_gpus_that_cannot_be_are_refused(capacity: dict[str, object]) -> None:
    with pytest.raises(InvalidValue, match=r"gpu_|device"):
        Workflow.from_document({"stages": [{"name": "a"}], "capacity": capacity})

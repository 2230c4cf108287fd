"""The ML pipeline is a flow that any Prefect runs, and gives one result however it is run."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FLOW = Path(__file__).parents[2] / "examples" / "ml_pipeline" / "flow.py"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("ml_pipeline_example", FLOW)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def one_core() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_it_learns_to_read_digits_under_the_stock_task_runner(example: ModuleType, prefect_server: str) -> None:
    assert example.stock(scale=0.1) > 0.9


def test_the_decorator_changes_neither_the_result_nor_the_flow(example: ModuleType, prefect_server: str) -> None:
    assert example.ml_pipeline(scale=0.1) == example.stock(scale=0.1)
    assert example.ml_pipeline.name == example.stock.name == "ml-pipeline"


def test_distortions_are_the_same_on_one_core(example: ModuleType, one_core: None) -> None:
    images, labels = example.digits()[1]
    assert example.cores() == 1
    narrow, _ = example.distorted(images, labels, copies=3, seed=5)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    wide, repeated = example.distorted(images, labels, copies=3, seed=5)
    np.testing.assert_array_equal(narrow, wide)
    assert repeated.tolist() == labels.tolist() * 3


def test_shards_hold_different_trees_and_merge_keeps_half_of_them(example: ModuleType) -> None:
    features = example.pca.fn(0.1)
    shards = [example.train.fn(i, features, 4) for i in range(2)]
    forest = example.merge.fn(features, shards)
    assert len(forest.estimators_) == 4
    assert len(shards[0].estimators_) == 4, "the shard itself is left as it was"
    assert pickle.dumps(shards[0].estimators_[0].tree_) != pickle.dumps(shards[1].estimators_[0].tree_)


def test_what_travels_between_stages_is_a_few_megabytes_at_scale_one(example: ModuleType) -> None:
    features = example.pca.fn(1.0)
    shard = example.train.fn(0, features)
    assert len(pickle.dumps(features)) < 5e6
    assert len(pickle.dumps(shard)) < 2e6

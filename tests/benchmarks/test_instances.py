"""The random workflows of the planner's benchmark have the width and depth that they claim."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from prefect_slo.planner.solver import solve


@pytest.fixture(scope="module")
def instances():
    spec = importlib.util.spec_from_file_location("planner_instances", Path(__file__).parent / "planning/instances.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def layers(graph) -> list[int]:
    depth: list[int] = []
    for parents in graph:
        depth.append(1 + max((depth[p] for p, _ in parents), default=0))
    return depth


def test_width_and_depth_follow_the_published_shares(instances):
    rng = np.random.default_rng(0)
    drawn = [layers(instances.azure(rng)) for _ in range(3000)]
    depth = np.array([max(each) for each in drawn])
    width = np.array([np.bincount(each).max() for each in drawn])
    for share, limits, values in ((instances.DEPTH, (1, 2, 3, 5), depth), (instances.WIDTH, (1, 2, 8), width)):
        for limit in limits:
            assert np.mean(values <= limit) == pytest.approx(dict(share)[limit], abs=0.03)


def test_bounds_and_budgets_can_be_kept(instances):
    for instance in instances.instances("azure", 0, 4, 200, workers=(1, 2, 4), vcpus=(1, 2)):
        for goal in (instance.timed, instance.budgeted):
            assert solve(instance.problem, goal).choice is not None

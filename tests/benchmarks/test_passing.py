"""A seeded form of the sweep of data passing: the choice is the best of all, crossovers are where they should be."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("passing_sweep", Path(__file__).parent / "passing.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check(sweep, fan_outs) -> None:
    methods: set[str] = set()
    for name, case in sweep.cases(fan_outs):
        found = sweep.best_passing(case.stages, case.edges, case.links)
        assert found.latency_s == pytest.approx(sweep.brute_force(case)), name
        methods |= set(found.methods.values())
    assert methods == {"machine", "direct", "remote", "inline"}, "the sweep has a place for each"


def test_over_fan_out_bandwidth_and_size_the_choice_is_the_best_of_all(sweep, monkeypatch) -> None:
    monkeypatch.setattr(sweep, "GRAPHS", {name: sweep.GRAPHS[name] for name in ("chain of 3", "diamond")})
    check(sweep, (1, 2, 13, 64))


@pytest.mark.slow
def test_over_the_whole_sweep_the_choice_is_the_best_of_all(sweep) -> None:
    check(sweep, (1, 2, 4, 7, 13, 24, 40, 64))


def test_crossovers_are_within_one_of_their_closed_form(sweep) -> None:
    off = sweep.crossover_errors()
    assert len(off) >= 5
    assert max(off) <= 1

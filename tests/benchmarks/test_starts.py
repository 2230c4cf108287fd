"""A seeded form of the promises that starts decide: they are broken about as seldom as they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def starts():
    spec = importlib.util.spec_from_file_location("start_promises", Path(__file__).parent / "starts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_promises_that_starts_decide_are_broken_about_as_seldom_as_they_say(starts) -> None:
    found = starts.prices(24, 0.2, 40)
    assert np.mean(found < 1) < 0.2, "without what so few starts leave open, 38 % are"
    assert np.median(found) < 1.15

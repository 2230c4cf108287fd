"""For users' own tests: whether a flow keeps its bound, asked of a stored profile, in virtual time."""

from __future__ import annotations

from prefect_slo.testing.asserting import SloNotMet, assert_meets_slo, store_profile
from prefect_slo.testing.backend import FakeBackend
from prefect_slo.testing.clock import FakeClock
from prefect_slo.testing.virtual import VirtualRun, virtual_run, virtual_runs

__all__ = [
    "FakeBackend",
    "FakeClock",
    "SloNotMet",
    "VirtualRun",
    "assert_meets_slo",
    "store_profile",
    "virtual_run",
    "virtual_runs",
]

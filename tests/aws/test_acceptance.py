"""The whole way on Lambda, small: profiled at five memory sizes, planned for a deadline, run by the plan."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from prefect import flow, task

from prefect_slo.testing.aws import local_aws

pytest.importorskip("threadpoolctl")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "lambda_acceptance.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path))
    spec = importlib.util.spec_from_file_location("lambda_acceptance", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@task
def split(n: int) -> list[int]:
    spin(0.01)
    return list(range(n))


@task
def square(x: int) -> int:
    spin(0.01)
    return x * x


@task
def total(xs: list[int]) -> int:
    return sum(xs)


def spin(cpu_s: float) -> None:
    """Work that takes longer in a smaller function."""
    until = time.process_time() + cpu_s
    while time.process_time() < until:
        pass


@flow(name="squares-on-lambda")
def squares(n: int = 6) -> int:
    return total.submit(square.map(split.submit(n).result())).result()


def test_a_flow_is_profiled_planned_and_run_on_lambda(script: ModuleType, prefect_server: str) -> None:
    with local_aws(cpu="modelled") as account:
        pool = account.pool(memory_mb=(256, 384, 512, 640, 768), workers=(1, 2), concurrency=2)
        swept, found = script.accept(account, pool, squares, {"n": 6}, runs=2, repeats=1, bounds=(60.0,))
    assert swept >= 5
    for series in found:
        assert not series.infeasible
        assert len(series.latency_s) == series.same == series.exact == 2
        assert set(series.plan) == {"split", "square", "total"}
        assert all("MB" in size for size in series.plan.values())
    pooled = script.summary(found)
    assert (pooled["runs"], pooled["missed"]) == (2, 0)
    assert 0.4 < pooled["cost_actual_over_predicted"] < 2.5

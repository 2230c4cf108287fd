"""Importing the package costs about what importing Prefect costs, and nothing heavy comes along."""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

import prefect_slo

HEAVY = (
    "pandas", "cvxpy", "boto3", "botocore", "scipy", "networkx", "numpy", "sklearn", "pyarrow", "prefect.server",
    "prefect_slo.models", "prefect_slo.planner", "prefect_slo.blocks", "prefect_slo.runner.session",
)  # fmt: skip
DECORATED = """
from prefect import flow, task
from prefect_slo import slo

@task
def square(x): return x * x

@slo(latency="30s")
@flow
def squares(n): return square.map(range(n)).result()
"""

NEW_MODULES = """
import sys
{before}
had = set(sys.modules)
{code}
print(*(set(sys.modules) - had), sep="\\n")
"""

CPU_SECONDS = """
import time
start = time.process_time()
{code}
print(time.process_time() - start)
"""


def fresh(code: str) -> str:
    """What ``code`` prints in a new interpreter."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("before", "code"),
    [
        ("", "import prefect_slo"),
        ("import prefect", "import prefect_slo"),
        ("from prefect import flow, task", DECORATED),
    ],
    ids=["alone", "beside Prefect", "a decorated flow"],
)
def test_heavy_libraries_are_imported_only_when_needed(before: str, code: str) -> None:
    new = fresh(NEW_MODULES.format(before=before, code=code)).split()
    assert "prefect_slo" in new
    assert not [name for name in new if name.startswith(HEAVY)]


@pytest.mark.slow
def test_the_package_imports_in_115_percent_of_prefects_time() -> None:
    """Medians of CPU time, the two taken in turn so that a busy machine slows both."""
    stock = "from prefect import flow, task"
    pairs = [
        [float(fresh(CPU_SECONDS.format(code=c))) for c in (stock, f"{stock}; from prefect_slo import slo")]
        for _ in range(7)
    ]
    prefect_s, ours_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    assert ours_s <= 1.15 * prefect_s


@pytest.mark.parametrize(
    "name",
    ["Budget", "Latency", "Plan", "SLOTaskRunner", "Slo", "Workflow", "WorkflowModel", "make_plan", "slo_task"],
)
def test_a_public_name_can_be_had_from_the_package(name: str) -> None:
    assert getattr(prefect_slo, name).__name__ == name
    assert name in dir(prefect_slo)


def test_a_name_that_there_is_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="moon"):
        prefect_slo.moon  # noqa: B018

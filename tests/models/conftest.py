"""A synthetic truth to learn from: Amdahl stages with log-normal noise on a menu of workers and sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from prefect_slo.models.design import Points, StageData
from prefect_slo.resources import Menu, Size
from prefect_slo.workflow import Edge, Stage, Workflow

WORKERS = (1, 2, 4, 8)
VCPUS = (0.5, 1.0, 2.0, 4.0)


def _truth(workers: np.ndarray, vcpus: np.ndarray) -> np.ndarray:
    return 1.0 + 30.0 / (workers * vcpus) + 4.0 / workers


@pytest.fixture
def truth() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Median wall time of the synthetic stage."""
    return _truth


@pytest.fixture
def stage_data() -> Callable[..., StageData]:
    """Rows of the synthetic stage: every setting, some repeats, multiplicative noise."""

    def build(*, repeats: int = 3, sigma: float = 0.05, seed: int = 0, steps: bool = False) -> StageData:
        rng = np.random.default_rng(seed)
        d, v = (grid.ravel() for grid in np.meshgrid(np.repeat(WORKERS, repeats), VCPUS))
        wall = _truth(d, v) * np.exp(sigma * rng.standard_normal(len(d)))
        busy = 0.9 * wall
        split = np.array([0.1, 0.8, 0.1]) * busy[:, None] if steps else np.zeros((len(d), 0))
        return StageData(Points.of(d.astype(float), v), wall, busy, split)

    return build


@pytest.fixture
def menu() -> Menu:
    return Menu("local", WORKERS, tuple(Size(v, int(1024 * v)) for v in VCPUS))


@pytest.fixture
def diamond(menu: Menu) -> Workflow:
    """load → (left, right) → join."""
    return Workflow(
        "diamond",
        (
            Stage("load", menu=menu),
            Stage("left", (Edge("load"),), menu),
            Stage("right", (Edge("load"),), menu),
            Stage("join", (Edge("left"), Edge("right")), menu),
        ),
    )


@pytest.fixture
def table() -> Callable[..., dict[str, list[object]]]:
    """A stage-run table of every stage of a workflow, run at every setting in turn."""

    def build(
        workflow: Workflow, *, repeats: int = 2, sigma: float = 0.05, seed: int = 0, start: int = 0
    ) -> dict[str, list[object]]:
        rng = np.random.default_rng(seed)
        columns: dict[str, list[object]] = {
            name: [] for name in ("run_id", "stage", "workers", "vcpus", "memory_mb", "wall_s", "overhead_s")
        }
        settings = [(d, v) for _ in range(repeats) for d in WORKERS for v in VCPUS]
        for k, (d, v) in enumerate(settings):
            for stage in workflow.stages:
                wall = float(_truth(np.array(d), np.array(v)) * np.exp(sigma * rng.standard_normal()))
                row = (f"run-{start + k:04d}", stage.name, d, v, 1024 * v, wall, 0.1 * wall)
                for column, value in zip(columns, row, strict=True):
                    columns[column].append(value)
        return columns

    return build

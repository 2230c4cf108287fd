"""A plan with what it predicts, over a graph that has every kind of edge."""

from __future__ import annotations

import pytest

from prefect_slo.artifacts import StageForecast
from prefect_slo.objective import Latency, Slo
from prefect_slo.plan import Certificate, Plan, Prediction, Quantiles, StagePlan
from prefect_slo.resources import Size
from prefect_slo.workflow import Edge, Stage, Workflow

ODD = 'audit <b>"x"|y</b>'


@pytest.fixture
def workflow() -> Workflow:
    return Workflow(
        "ml-pipeline",
        (
            Stage("pca"),
            Stage("train", (Edge("pca"),)),
            Stage("merge", (Edge("train", "item"),)),
            Stage(ODD, (Edge("pca"),), probability=0.3),
        ),
    )


@pytest.fixture
def plan() -> Plan:
    return Plan(
        "ml-pipeline",
        Slo(Latency(4.0)),
        {
            "pca": StagePlan(1, Size(2, 2048)),
            "train": StagePlan(2, Size(1, 1024), record="summary"),
            "merge": StagePlan(1, Size(1, 1024)),
            ODD: StagePlan(),
        },
        Prediction(Quantiles(3.2, 3.15, 3.72, 4.0), Quantiles(6.41e-5, 6.4e-5, 7.02e-5, 7.5e-5), 3.72, 7.02e-5),
        Certificate(6e-5, 0.004, 0.01, 100_000, 3_912, 0.99, 12),
    )


@pytest.fixture
def forecasts() -> dict[str, StageForecast]:
    return {
        "pca": StageForecast(0.42, 0.47, 5e-6, 1.0),
        "train": StageForecast(1.55, 1.71, 3e-5, 0.93),
        "merge": StageForecast(0.58, 0.63, 1e-5, 0.93),
        ODD: StageForecast(0.31, 0.5, 1e-5, 0.02),
    }

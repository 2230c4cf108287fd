"""Peak memory of one plan of 50 stages of 64 options, in MB; run as a process of its own."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from planning.instances import module
from planning.speed import LARGE

from prefect_slo.objective import Latency
from prefect_slo.planner import make_plan
from prefect_slo.planner.baselines import uniform

if __name__ == "__main__":
    model = module("conftest").synthetic("diamonds", 50, seed=0, **LARGE)
    bound = 1.2 * uniform(model, Latency(1e6), samples=500).predicted.latency_s.p95
    make_plan(model, Latency(bound))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

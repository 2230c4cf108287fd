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


def peak_mb() -> float:
    """The most memory that this program held; what the one before it in the same process held doesn't count."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    model = module("conftest").synthetic("diamonds", 50, seed=0, **LARGE)
    bound = 1.2 * uniform(model, Latency(1e6), samples=500).predicted.latency_s.p95
    make_plan(model, Latency(bound))
    print(peak_mb())

"""Are promises kept where what a run takes is decided by whether its workers have to start, and runs to learn from few?

    python tests/benchmarks/starts.py [--replications 200]

Two stages of 2 s, one after the other, on a pool whose workers start in a share of runs, in both stages, which adds 4 s
to each, log-normal. So many runs are learned from, and a bound is promised: the least P95 that 90 % of the truths keep
which the runs leave open. It is *broken* where the true P95 is above it, which should be the case one time in ten. The
price is the bound over the true P95.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from prefect_slo.models import WorkflowModel
from prefect_slo.observation import StageRun, StageRuns
from prefect_slo.resources import Menu, Option, Pool, Size
from prefect_slo.workflow import Edge, Stage, Workflow

STAGES = ("read", "write")
WORK_S, START_S, SIGMA = 2.0, 4.0, 0.15
PERCENTILE, CONFIDENCE = 0.95, 0.9
TRUTHS, RUNS = 512, 200
SHARES, LEARNED = (0.03, 0.1, 0.2, 0.4), (12, 24, 60)

ELSEWHERE = Size(1, 1024, hardware="elsewhere")
PLAN = {name: Option(1, ELSEWHERE, "pool") for name in STAGES}

Floats = NDArray[np.float64]


def drawn(n: int, share: float, rng: np.random.Generator) -> tuple[NDArray[np.bool_], Floats, Floats]:
    """Whether runs start cold, and their stages' seconds of work and of start, ``(2, n)``."""
    cold = rng.random(n) < share
    work = WORK_S * rng.lognormal(0.0, 0.02, (2, n))
    return cold, work, np.where(cold, START_S * rng.lognormal(0.0, SIGMA, (2, n)), 0.0)


def true_percentile(share: float) -> float:
    """P95 of runs, in seconds."""
    _, work, start = drawn(400_000, share, np.random.default_rng(1))
    return float(np.quantile((work + start).sum(axis=0), PERCENTILE))


def promised(n: int, share: float, rng: np.random.Generator) -> float:
    """The bound that is promised after so many runs, in seconds."""
    menu = Menu(workers=(1,), sizes=(ELSEWHERE,), pools=(Pool("pool", (ELSEWHERE,)),))
    workflow = Workflow("pooled", (Stage("read", (), menu), Stage("write", (Edge("read"),), menu)))
    cold, work, start = drawn(n, share, rng)
    rows = [
        StageRun(
            f"run-{i:03}", stage, 1, 1024, 1.0, float(work[k, i] + start[k, i]), overhead_s=0.05 * float(work[k, i]),
            items=0, cold=bool(cold[i]), hardware="elsewhere", start_s=float(start[k, i]),
            billed_s=float(work[k, i] + start[k, i]),
        )
        for i in range(n)
        for k, stage in enumerate(STAGES)
    ]  # fmt: skip
    model = WorkflowModel(workflow).fit(StageRuns.of(rows))
    latency = model.truths(TRUTHS, RUNS, np.random.default_rng(0)).of(PLAN).latency_s.reshape(TRUTHS, RUNS)
    return float(np.quantile(np.quantile(latency, PERCENTILE, axis=1), CONFIDENCE))


def prices(n: int, share: float, replications: int) -> Floats:
    """Promised bounds over the true P95; below 1, they are broken."""
    true_s = true_percentile(share)
    seeds = ([k, n, round(100 * share)] for k in range(replications))
    return np.asarray([promised(n, share, np.random.default_rng(seed)) / true_s for seed in seeds])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replications", type=int, default=200)
    options = parser.parse_args()
    print(f"{'runs that start':>16}{'learned from':>14}{'broken':>9}{'price, median':>15}{'nine in ten':>13}")
    for share in SHARES:
        for n in LEARNED:
            found = prices(n, share, options.replications)
            median, most = np.quantile(found, (0.5, 0.9))
            print(f"{share:16.0%}{n:14}{np.mean(found < 1):9.1%}{median:15.3f}{most:13.3f}", flush=True)


if __name__ == "__main__":
    main()

"""Jolteon (NSDI 2024): sampled constraints, a continuous program, rounding and probing."""

from prefect_slo.planner.baselines.jolteon.planner import jolteon, jolteon_samples

__all__ = ["jolteon", "jolteon_samples"]

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from prefect_slo.errors import InvalidValue
from prefect_slo.planner.certify import allowed_violations, hoeffding_samples, judge, samples_needed


@pytest.mark.parametrize(
    ("samples", "error", "allowed"),
    [(1_000, 1e-3, 29), (2_000, 1e-3, 70), (4_000, 1e-3, 158), (100_000, 1e-3, 4787), (100_000, 1e-2, 4839)],
)
def test_thresholds_are_the_exact_binomial_ones(samples, error, allowed):
    assert allowed_violations(samples, 0.05, error) == allowed
    assert binom.cdf(allowed, samples, 0.05) <= error < binom.cdf(allowed + 1, samples, 0.05)


def test_too_few_samples_pass_nothing():
    assert allowed_violations(50, 0.05, 0.01) == -1
    assert not judge([(np.zeros(50), 1.0)], 0.95, 0.01).passed


@pytest.mark.parametrize(("error", "samples"), [(0.05, 59), (0.01, 90), (0.001, 135)])
def test_clean_runs_that_a_p95_claim_takes(error, samples):
    assert samples_needed(0.05, error) == samples
    assert allowed_violations(samples, 0.05, error) == 0
    assert allowed_violations(samples - 1, 0.05, error) == -1


@pytest.mark.parametrize(("plans", "samples"), [(28**2, 2715), (28**4, 4048), (28**8, 6714)])
def test_hoeffding_sizes_of_the_published_planner(plans, samples):
    assert hoeffding_samples(0.05, 0.001, math.log(plans)) == samples


def test_a_plan_that_truly_breaks_its_percentile_hardly_ever_passes():
    rng = np.random.default_rng(0)
    passed = sum(judge([(rng.random(20_000), 0.9495)], 0.95, 0.01).passed for _ in range(2000))
    assert binom.sf(passed - 1, 2000, 0.01) > 1e-3


def test_the_worse_kept_bound_decides():
    clean, dirty = np.zeros(10_000), np.r_[np.ones(600), np.zeros(9_400)]
    verdict = judge([(clean, 0.5), (dirty, 0.5)], 0.95, 0.01)
    assert verdict.violations == 600
    assert not verdict.passed
    assert judge([(clean, 0.5)], 0.95, 0.01).passed


def test_a_test_needs_a_bound():
    with pytest.raises(InvalidValue, match="bounds"):
        judge([], 0.95, 0.01)

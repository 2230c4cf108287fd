"""Known answers of the empirical and analytic models and of the inputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.models.analytic import Analytic
from prefect_slo.models.design import Points, StageData
from prefect_slo.models.empirical import LEVELS, Empirical, conditional_share, convolve, maximum
from prefect_slo.models.inputs import Inputs


def test_percentiles_between_two_sizes_are_interpolated_one_by_one() -> None:
    rng = np.random.default_rng(0)
    small, large = 10 * rng.lognormal(0, 0.2, 2000), 4 * rng.lognormal(0, 0.4, 2000)
    vcpus = np.repeat([1.0, 3.0], 2000)
    wall = np.r_[small, large]
    model = Empirical().fit(StageData(Points.of(np.ones(4000), vcpus), wall, wall, np.zeros((4000, 0))))
    for q in (0.1, 0.5, 0.95):
        expected = (np.quantile(small, q) + np.quantile(large, q)) / 2
        assert model.quantile(Points.of([1.0], [2.0]), q)[0] == pytest.approx(expected, rel=0.01)


def test_beyond_the_profiled_sizes_the_nearest_holds() -> None:
    wall = np.array([8.0, 4.0])
    model = Empirical().fit(StageData(Points.of([1.0, 1.0], [1.0, 2.0]), wall, wall, np.zeros((2, 0))))
    assert model.mean(Points.of([1.0, 1.0], [0.1, 9.0])).tolist() == pytest.approx([8.0, 4.0])


def test_convolution_adds_means_and_variances() -> None:
    from scipy.stats import norm

    total = convolve(10 + norm.ppf(LEVELS), 20 + 2 * norm.ppf(LEVELS))
    assert total.mean() == pytest.approx(30, abs=0.02)
    assert np.quantile(total, 0.95) == pytest.approx(30 + 1.645 * np.sqrt(5), rel=0.01)


@given(st.integers(1, 40))
def test_the_maximum_of_independent_workers_is_the_nth_root_percentile(workers: int) -> None:
    slowest = maximum(LEVELS, workers)
    inside = LEVELS ** (1 / workers) <= LEVELS[-1]
    np.testing.assert_allclose(slowest[inside], (LEVELS ** (1 / workers))[inside], atol=0.006)


def test_workers_that_are_slow_together_have_an_earlier_maximum() -> None:
    rng = np.random.default_rng(0)
    common = rng.lognormal(0, 0.5, 4000)
    pairs = np.stack([common * rng.lognormal(0, 0.05, 4000) for _ in range(2)], axis=1)
    curve = np.quantile(pairs[:, 0], LEVELS)
    together = maximum(curve, 16, conditional_share(pairs, curve))
    assert np.median(together) < np.median(maximum(curve, 16))
    two = maximum(curve, 2, conditional_share(pairs, curve))
    assert np.quantile(two, 0.9) == pytest.approx(np.quantile(pairs.max(axis=1), 0.9), rel=0.05)


def test_the_line_is_asked_where_it_was_fitted() -> None:
    d, v = (g.ravel() for g in np.meshgrid([1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0]))
    wall = 24.0 / (d * v) + 2.0
    model = Analytic().fit(StageData(Points.of(d, v), wall, wall, np.zeros((12, 0))))
    np.testing.assert_allclose(model.quantile(Points.of([16.0], [2.0]), 0.5), 24 / 32 + 2, rtol=0.02)


def test_a_negative_slope_is_not_fitted() -> None:
    d = np.array([1.0, 2.0, 4.0, 8.0])
    wall = np.array([1.0, 2.0, 3.0, 4.0])
    model = Analytic().fit(StageData(Points.of(d, np.ones(4)), wall, wall, np.zeros((4, 0))))
    assert model.wall.min() >= 0


@given(st.lists(st.integers(1, 500), min_size=1, max_size=80))
def test_levels_of_input_keep_the_distribution_of_the_items(items: list[int]) -> None:
    counts = np.array(items, dtype=float)
    inputs = Inputs.of(counts, np.ones((len(counts), 0)), np.ones(len(counts)))
    assert len(inputs) <= 12
    assert (np.diff(inputs.items) >= 0).all()
    drawn = inputs.items[inputs.levels(np.linspace(0, 1, 4001)[:-1])]
    assert drawn.mean() == pytest.approx(counts.mean(), rel=0.15, abs=1)
    assert inputs.items.min() >= counts.min() - 1e-9
    assert inputs.items.max() <= counts.max() + 1e-9

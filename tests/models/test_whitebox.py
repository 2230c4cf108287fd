"""The white box: what it recovers, what it flags, and how sure it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_slo.models.analytic import Analytic
from prefect_slo.models.basis import LEVELS, dictionary
from prefect_slo.models.design import Points, StageData
from prefect_slo.models.luck import luck_of
from prefect_slo.models.posynomial import batched_nonnegative, nonnegative
from prefect_slo.models.whitebox import WhiteBox

Build = Callable[..., StageData]
GRID = Points.of(*(g.ravel() for g in np.meshgrid([1.0, 2.0, 3.0, 6.0, 8.0], [0.5, 1.0, 2.0, 3.0, 4.0])))


@given(st.integers(0, 10_000), st.floats(0.01, 0.2))
def test_the_basis_never_gets_slower_with_more_vcpus_or_faster_with_more_upstream(seed: int, sigma: float) -> None:
    rng = np.random.default_rng(seed)
    d, v = (g.ravel() for g in np.meshgrid([1.0, 4.0, 16.0], [0.5, 1.0, 2.0, 4.0]))
    upstream = rng.integers(1, 9, len(d)).astype(float)
    wall = rng.exponential() + rng.exponential(20) / (d * v) + 0.02 * upstream
    wall = wall * np.exp(sigma * rng.standard_normal(len(d)))
    data = StageData(Points.of(d, v, upstream=upstream), wall, 0.9 * wall, np.zeros((len(d), 0)))
    model = WhiteBox(correct=False).fit(data)
    sizes = np.linspace(0.5, 6.0, 12)
    by_size = model.median(Points.of(np.full(12, 4.0), sizes, upstream=4.0))
    by_upstream = model.median(Points.of(np.full(12, 4.0), np.ones(12), upstream=np.arange(12.0)))
    assert (np.diff(by_size) <= 1e-9 * by_size[1:]).all()
    assert (np.diff(by_upstream) >= -1e-9 * by_upstream[1:]).all()


@given(st.sampled_from(LEVELS))
def test_every_level_of_the_dictionary_is_non_negative_and_holds_the_one_before(level: str) -> None:
    terms = dictionary(GRID, level)  # type: ignore[arg-type]
    assert all((column >= 0).all() for column in terms.values())
    before = LEVELS[max(LEVELS.index(level) - 1, 0)]  # type: ignore[arg-type]
    assert set(dictionary(GRID, before)) <= set(terms)


def test_settings_left_out_are_predicted_within_the_noise(stage_data: Build) -> None:
    data = stage_data(repeats=3, sigma=0.05)
    settings = data.points.settings
    errors = []
    for k in range(int(settings.max()) + 1):
        held_out = data.take(settings == k)
        predicted = WhiteBox().fit(data.take(settings != k)).median(held_out.points)
        errors.append(np.abs(predicted / held_out.wall_s - 1))
    assert np.mean(errors) < 0.06


@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_noise_keeps_its_width_and_its_skew(stage_data: Build, shape: str) -> None:
    clean = stage_data(repeats=6, sigma=0.0)
    rng = np.random.default_rng(3)
    logs = 0.1 * rng.standard_normal(len(clean)) if shape == "normal" else np.log1p(0.1 * rng.pareto(3, len(clean)))
    data = replace(clean, wall_s=clean.wall_s * np.exp(logs), busy_s=clean.busy_s * np.exp(logs))
    wall, _ = WhiteBox().fit(data).noise.sample(20_000, np.random.default_rng(0))
    for q in (0.5, 0.9, 0.95):
        assert np.quantile(wall, q) - np.mean(wall) == pytest.approx(np.quantile(logs, q) - np.mean(logs), abs=0.025)


def test_a_setting_that_departs_from_the_basis_is_corrected_and_flagged(stage_data: Build) -> None:
    data = stage_data(repeats=4, sigma=0.03)
    odd = (data.points.workers == 4) & (data.points.vcpus == 2.0)
    wall = np.where(odd, 1.4, 1.0) * data.wall_s
    model = WhiteBox().fit(replace(data, wall_s=wall, busy_s=0.9 * wall))
    at = Points.of([4.0], [2.0])
    assert model.median(at)[0] == pytest.approx(np.median(wall[odd]), rel=0.08)
    first = np.unique(data.points.settings, return_index=True)[1]
    assert model.misfits().tolist() == odd[first].tolist()


def test_work_in_pieces_stops_scaling_at_the_pieces() -> None:
    d, v = (g.ravel() for g in np.meshgrid([4.0, 8.0, 16.0, 32.0], [1.0, 2.0, 3.0, 4.0]))
    wall = 100.0 / np.minimum(d * v, 32) + 0.5
    data = StageData(Points.of(d, v), wall, wall, np.zeros((len(d), 0)))
    at = Points.of([24.0, 32.0], [4.0, 2.5])
    np.testing.assert_allclose(WhiteBox().fit(data).median(at), 100 / 32 + 0.5, rtol=0.03)


def test_upstream_workers_are_used_only_where_they_matter(stage_data: Build) -> None:
    rng = np.random.default_rng(0)
    data = stage_data(repeats=3, sigma=0.02)
    upstream = rng.choice([1.0, 4.0, 16.0], len(data))
    points = replace(data.points, upstream=upstream)
    assert not WhiteBox().fit(replace(data, points=points)).depends_on_upstream
    slower = data.wall_s + 0.5 * upstream
    model = WhiteBox().fit(StageData(points, slower, 0.9 * slower, data.steps_s))
    assert model.depends_on_upstream
    low, high = model.median(Points.of([4.0, 4.0], [2.0, 2.0], upstream=[1.0, 16.0]))
    assert high - low == pytest.approx(7.5, rel=0.1)


def test_few_settings_are_less_sure_than_many(stage_data: Build) -> None:
    at = Points.of([3.0], [1.5])
    many = stage_data(repeats=4, sigma=0.05)
    few = many.take(np.isin(many.points.settings, [0, 5, 10, 15]))
    spreads = [
        np.ptp(np.quantile(WhiteBox().fit(data).sample(at, 4000, np.random.default_rng(0)).wall_s, (0.05, 0.95)))
        for data in (many, few)
    ]
    assert spreads[1] > 1.15 * spreads[0]


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_a_few_repeats_predict_about_the_tail_that_there_is(sigma: float) -> None:
    """Four settings twice: the repeats alone tell the noise, whatever the fit takes away."""
    ratios = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        d, v = (np.tile(g.ravel(), 2) for g in np.meshgrid([1.0, 2.0], [1.0, 2.0]))
        median = 1.0 + 4.0 / (d * v)
        wall = median * np.exp(sigma * rng.standard_normal(8))
        model = WhiteBox().fit(StageData(Points.of(d, v), wall, 0.95 * wall, np.zeros((8, 0))))
        ratios.append(float(model.quantile(Points.of([2.0], [2.0]), 0.95)[0] / (2.0 * np.exp(1.645 * sigma))))
    assert 0.97 < np.median(ratios) < 1.25


def test_blocks_share_parameters_and_differ_between_each_other(stage_data: Build) -> None:
    model = WhiteBox().fit(stage_data(repeats=2, sigma=0.1))
    at = Points.of([4.0], [2.0])
    draws = model.sample(at, 200 * 400, np.random.default_rng(0), blocks=200).wall_s.reshape(200, 400)
    free = model.sample(at, 200 * 400, np.random.default_rng(1)).wall_s.reshape(200, 400)
    assert np.std(np.median(draws, axis=1)) > 2 * np.std(np.median(free, axis=1))
    assert np.quantile(draws, 0.95) == pytest.approx(np.quantile(free, 0.95), rel=0.06)


@pytest.mark.parametrize("kind", [WhiteBox, Analytic])
@pytest.mark.parametrize("blocks", [None, 20])
def test_luck_is_the_same_at_every_point_and_for_some_runs_of_all(
    stage_data: Build, kind: type[WhiteBox | Analytic], blocks: int | None
) -> None:
    model = kind().fit(stage_data(repeats=2, sigma=0.1))
    here, there = Points.of([4.0], [2.0]), Points.of([8.0], [2.0])
    luck = luck_of(model, 2000, np.random.default_rng(0), blocks)
    all_runs, some = luck.at(here).wall_s, np.array([3, 77, 1500])
    np.testing.assert_array_equal(luck.at(here, some).wall_s, all_runs[:, some])
    np.testing.assert_array_equal(luck.at(here).busy_s, luck.at(here).busy_s)
    logs = np.log(np.concatenate([all_runs, luck.at(there).wall_s]))
    assert np.corrcoef(logs)[0, 1] > 0.8
    again = luck_of(model, 2000, np.random.default_rng(1), blocks).at(here).wall_s
    assert abs(np.corrcoef(np.log(np.concatenate([all_runs, again])))[0, 1]) < 0.3


@given(st.integers(0, 10_000))
def test_the_batched_solver_agrees_with_lawson_and_hanson(seed: int) -> None:
    rng = np.random.default_rng(seed)
    design = rng.random((20, 4))
    target = design @ np.array([1.0, 0.5, 0.2, 0.1]) + 0.05 * rng.standard_normal(20)
    weights = rng.exponential(size=(8, 20))
    batch = batched_nonnegative(design, target, weights)
    for theta, weight in zip(batch, weights, strict=True):
        exact = nonnegative(design, target, weight)
        losses = [np.sum(weight * (target - design @ t) ** 2) for t in (theta, exact)]
        assert (theta >= 0).all()
        assert losses[0] <= losses[1] * 1.02 + 1e-9


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_heavy_outliers_move_neither_basis_nor_median(
    stage_data: Build, truth: Callable[..., np.ndarray], sigma: float
) -> None:
    data = stage_data(repeats=4, sigma=sigma / 4)
    wall = data.wall_s.copy()
    wall[::17] *= 3.0
    model = WhiteBox().fit(replace(data, wall_s=wall, busy_s=0.9 * wall))
    np.testing.assert_allclose(model.median(GRID), truth(GRID.workers, GRID.vcpus), rtol=0.12)
    assert model.quantile(GRID, 0.99)[0] > 1.5 * model.median(GRID)[0]


@pytest.mark.parametrize("grows", [True, False])
def test_noise_that_grows_with_workers_is_seen_where_the_rows_show_it(stage_data: Build, grows: bool) -> None:
    data = stage_data(repeats=8, sigma=0.0)
    sigma = 0.03 * data.points.workers if grows else np.full(len(data), 0.1)
    wall = data.wall_s * np.exp(sigma * np.random.default_rng(1).standard_normal(len(data)))
    model = WhiteBox().fit(replace(data, wall_s=wall, busy_s=0.9 * wall))
    at = Points.of([1.0, 8.0], [2.0, 2.0])
    narrow, wide = np.log(model.quantile(at, 0.95) / model.quantile(at, 0.5))
    assert wide / narrow > 2 if grows else 0.7 < wide / narrow < 1.4

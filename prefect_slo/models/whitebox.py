"""The default stage model: a posynomial with non-negative coefficients, corrected where it misses, plus noise.

    log T = log(θ·φ(x)) + g(x) + ε,    θ ≥ 0 (posynomial.py),  g (correction.py),  ε (noise.py)

for wall time and for busy time. Busy time is the sum of read, compute and write, each fitted by itself where the rows
have them; wall time adds an overhead (dispatch, start-up, waiting for the slowest). Parameter uncertainty is a Bayesian
bootstrap over settings for θ (Rubin 1981) and the posterior of g; it shrinks with more settings, ε does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from prefect_slo.errors import NotEnoughObservations
from prefect_slo.models.basis import LEVELS, Level, dictionary
from prefect_slo.models.correction import Correction, fit_correction, no_correction
from prefect_slo.models.design import Bools, Floats, Ints, Points, StageData
from prefect_slo.models.luck import SEEDS
from prefect_slo.models.noise import (
    Deviations,
    Noise,
    enough_repeats,
    fit_noise,
    mean_variances,
    setting_means,
    weighted_median,
    without_outliers,
)
from prefect_slo.models.posynomial import Posynomial, fit_posynomial
from prefect_slo.models.protocol import Draws, Response

_SEED = 20240416
_MISFIT = 4.0
_QUANTILE_SAMPLES = 4000

RESPONSES: tuple[Response, Response] = ("wall", "busy")

Parts = tuple[Posynomial, ...]


@dataclass(frozen=True)
class _Residuals:
    """Log residuals of the rows: against the point estimate and each parameter draw, ``(n_rows, 1 + n_draws)``, and of
    each row against the fit without its setting, ``(n_rows,)``."""

    rows: Floats
    held_out: Floats

    def centred(self, weights: Floats) -> _Residuals:
        """Less the median deviation: that of the noise from the basis, which is no misfit of any setting."""
        centre = weighted_median(self.rows[:, 0], weights)
        return _Residuals(self.rows - centre, self.held_out - centre)


@dataclass(frozen=True)
class _Fit:
    """Everything learned; see ``WhiteBox``."""

    busy: tuple[Posynomial, ...]
    overhead: Posynomial | None
    wall_correction: Correction
    busy_correction: Correction
    noise: Noise
    knob_names: tuple[str, ...]
    knob_effects: Floats
    floor_s: float


class WhiteBox:
    """Posynomial with correction and noise.

    Args:
        draws: Parameter draws kept; samples take one each.
        correct: Whether settings are corrected for what the basis misses; off for comparison.
    """

    def __init__(self, *, draws: int = 64, correct: bool = True) -> None:
        self.draws = draws
        self.correct = correct

    def fit(self, data: StageData) -> Self:
        """Learn from rows.

        Raises:
            NotEnoughObservations: No row at all.
        """
        if not len(data):
            raise NotEnoughObservations("stage", 0, 1, "Run the flow once in mode 'observe'.")
        names, effects, plain = _knob_effects(data)
        settings = plain.points.settings
        held_out = _leave_out_weights(settings)
        resamples = np.concatenate([_bootstrap(settings, self.draws), held_out])
        busy, overhead, residuals = self._select(plain, settings, resamples)
        wall, busy_only = residuals
        wall_correction, busy_correction = self._correction(plain, wall), self._correction(plain, busy_only)
        noise = fit_noise(
            wall.rows[:, 0] - wall_correction.at_settings[settings],
            busy_only.rows[:, 0] - busy_correction.at_settings[settings],
            wall_correction.absorbed, settings, plain.weights,
            terms=max(len(part.terms) for part in (*busy, *((overhead,) if overhead else ()))),
            workers=plain.points.workers,
        )  # fmt: skip
        self._fit = _Fit(
            tuple(_without_held_out(part, self.draws) for part in busy),
            _without_held_out(overhead, self.draws) if overhead else None,
            wall_correction, busy_correction,
            noise, names, effects, float(np.min(data.busy_s)) * 1e-3,
        )  # fmt: skip
        return self

    def mean(self, points: Points, response: Response = "wall") -> Floats:
        """Expected seconds at each point, shape ``(n_points,)``."""
        draws = self.sample(points, _QUANTILE_SAMPLES, np.random.default_rng(_SEED))
        values = draws.wall_s if response == "wall" else draws.busy_s
        expected: Floats = values.mean(axis=1, dtype=float)
        return expected

    def median(self, points: Points, response: Response = "wall") -> Floats:
        """Median seconds at each point by the point estimate, shape ``(n_points,)``."""
        fit = self._fit
        correction = fit.wall_correction if response == "wall" else fit.busy_correction
        seconds = np.sum([part.at(points) for part in self._parts(response)], axis=0)
        shift = correction.mean(points) + self._knob_shift(points) + fit.noise.median(response)
        corrected: Floats = np.maximum(seconds, fit.floor_s) * np.exp(shift)
        return corrected

    def quantile(self, points: Points, q: float, response: Response = "wall") -> Floats:
        """The ``q``-quantile in seconds at each point, shape ``(n_points,)``."""
        draws = self.sample(points, _QUANTILE_SAMPLES, np.random.default_rng(_SEED))
        return np.asarray(np.quantile(draws.wall_s if response == "wall" else draws.busy_s, q, axis=1), dtype=float)

    def sample(self, points: Points, n_samples: int, rng: np.random.Generator, *, blocks: int | None = None) -> Draws:
        """Joint draws at each point, shapes ``(n_points, n_samples)``; points share parameters and noise.

        With ``blocks``, samples come in that many consecutive blocks of equal size that share their parameters.
        """
        return self.luck(n_samples, rng, blocks=blocks).at(points)

    def luck(self, n_samples: int, rng: np.random.Generator, *, blocks: int | None = None) -> WhiteBoxLuck:
        """Parameters and noise of some runs; arguments as in ``sample``."""
        which = rng.integers(self.draws, size=n_samples) if blocks is None else _in_turn(self.draws, blocks, rng)
        seed = int(rng.integers(SEEDS))
        return WhiteBoxLuck(self, which, n_samples, seed, self._fit.noise.sample(n_samples, rng, blocks=blocks))

    def located(self, points: Points, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Wall and busy time without noise for every parameter draw, shapes ``(n_points, n_draws)``."""
        fit = self._fit
        terms = dictionary(points, overhead=fit.overhead is not None)
        busy = np.sum([part.draws_of(terms, len(points)) for part in fit.busy], axis=0)
        wall = busy if fit.overhead is None else busy + fit.overhead.draws_of(terms, len(points))
        shift = self._knob_shift(points)[:, None]
        located = []
        for total, correction in ((wall, fit.wall_correction), (busy, fit.busy_correction)):
            moved = np.exp(correction.draws(points, rng) + shift)
            located.append(np.asarray(np.maximum(total, fit.floor_s) * moved, dtype=np.float32))
        return located[0], located[1]

    @property
    def noise(self) -> Noise:
        """The fitted run-to-run noise."""
        return self._fit.noise

    @property
    def depends_on_upstream(self) -> bool:
        """Whether any term or correction uses the number of upstream workers."""
        parts = (*self._fit.busy, *((self._fit.overhead,) if self._fit.overhead else ()))
        return any(name.startswith("u") for part in parts for name in part.terms)

    def misfits(self) -> Bools:
        """Which measured settings the basis misses by more than four standard errors, shape ``(n_settings,)``."""
        return self._fit.wall_correction.misfit > _MISFIT

    def _parts(self, response: Response) -> tuple[Posynomial, ...]:
        overhead = (self._fit.overhead,) if self._fit.overhead is not None and response == "wall" else ()
        return (*self._fit.busy, *overhead)

    def _knob_shift(self, points: Points) -> Floats:
        effects = dict(zip(self._fit.knob_names, self._fit.knob_effects.tolist(), strict=True))
        typical = float(np.median(self._fit.knob_effects))
        return np.array([effects.get(name, typical) for name in points.knobs.tolist()])

    def _select(
        self, data: StageData, settings: Ints, resamples: Floats
    ) -> tuple[Parts, Posynomial | None, tuple[_Residuals, _Residuals]]:
        """Fit each level of the dictionary and keep the simplest that is within one standard error of the best.

        Levels are compared by the absolute log error of wall and busy time at settings left out of the fit, setting by
        setting, so that the standard error is that of the paired difference (Breiman et al. 1984, §3.4.3). With 20
        settings the best of several models by cross-validation alone is often the luckiest.
        """
        fits: list[tuple[Parts, Posynomial | None, tuple[_Residuals, _Residuals]]] = []
        losses: list[Floats] = []
        for level in LEVELS:
            busy, overhead = _fit_steps(data, resamples, level)
            wall = _total(busy, overhead, data.points)
            residuals = (
                _log_residuals(data.wall_s, wall, settings, self.draws),
                _log_residuals(data.busy_s, _total(busy, None, data.points), settings, self.draws),
            )
            fits.append((busy, overhead, residuals))
            losses.append(
                np.sum([setting_means(np.abs(part.held_out), settings, data.weights) for part in residuals], axis=0)
            )
        means = [float(loss.mean()) for loss in losses]
        best = int(np.argmin(means))
        for fit, loss in zip(fits, losses, strict=True):
            extra = loss - losses[best]
            if extra.mean() <= np.std(extra) / np.sqrt(len(extra)):
                return fit
        return fits[best]

    def _correction(self, data: StageData, residuals: _Residuals) -> Correction:
        settings, weights = data.points.settings, data.weights
        residuals = residuals.centred(weights)
        noise, variances = mean_variances(residuals.rows[:, 0], settings, weights)
        at = data.points.take(np.unique(settings, return_index=True)[1])
        surplus = residuals.rows[:, 0] - without_outliers(residuals.rows[:, 0], settings, weights, noise)
        means = np.stack([setting_means(column - surplus, settings, weights) for column in residuals.rows.T], axis=1)
        if not self.correct:
            return no_correction(at, means, variances)
        held_out = setting_means(residuals.held_out, settings, weights)
        return fit_correction(at, means, held_out, variances, noise, repeated=enough_repeats(settings))


def _fit_steps(data: StageData, resamples: Floats, level: Level) -> tuple[tuple[Posynomial, ...], Posynomial | None]:
    """Posynomials of the steps of busy time, and of the overhead where it is measured."""
    steps = list(data.steps_s.T) if data.steps_s.shape[1] else [data.busy_s]
    busy = tuple(
        fit_posynomial(data.points, step, data.busy_s, data.weights, resamples, level=level)
        for step in steps
        if step.any()
    )
    waiting = data.wall_s - data.busy_s
    if not np.any(waiting > 1e-9 * data.wall_s):
        return busy, None
    points, scale = data.points, data.wall_s
    return busy, fit_posynomial(points, waiting, scale, data.weights, resamples, level=level, overhead=True)


def _total(busy: tuple[Posynomial, ...], overhead: Posynomial | None, points: Points) -> Floats:
    """Seconds by the point estimate (first column) and every draw, shape ``(n_rows, 1 + n_resamples)``."""
    parts = (*busy, overhead) if overhead else busy
    total: Floats = np.sum([np.column_stack([part.at(points), part.draws_at(points)]) for part in parts], axis=0)
    return total


def _log_residuals(actual: Floats, estimates: Floats, settings: Ints, draws: int) -> _Residuals:
    floor = 1e-3 * float(np.min(actual))
    logs = np.log(actual)[:, None] - np.log(np.maximum(estimates, floor))
    return _Residuals(logs[:, : 1 + draws], logs[np.arange(len(actual)), 1 + draws + settings])


def _bootstrap(settings: Ints, draws: int) -> Floats:
    """Weights of the Bayesian bootstrap with settings as units, shape ``(draws, n_rows)``."""
    weights = np.random.default_rng(_SEED).exponential(size=(draws, int(settings.max()) + 1))
    return np.asarray(weights[:, settings], dtype=float)


def _leave_out_weights(settings: Ints) -> Floats:
    """Weights that leave out each setting in turn, shape ``(n_settings, n_rows)``; a lone setting leaves itself in."""
    count = int(settings.max()) + 1
    if count == 1:
        return np.ones((1, len(settings)))
    return np.asarray(np.arange(count)[:, None] != settings[None, :], dtype=float)


def _in_turn(draws: int, blocks: int, rng: np.random.Generator) -> Ints:
    """A parameter draw for each block, all as often as one another, in random order."""
    return np.asarray(rng.permutation(np.arange(blocks) % draws), dtype=np.int64)


def _widened(deviations: NDArray[np.float32], centre: float, scales: Floats) -> NDArray[np.floating]:
    """Deviations scaled around their centre, shape ``(n_scales, n_samples)``."""
    if len(scales) == 1 and scales[0] == 1.0:
        return deviations[None]
    return np.asarray(centre + np.outer(scales, deviations - centre))


def _without_held_out(part: Posynomial, draws: int) -> Posynomial:
    return Posynomial(part.terms, part.theta, part.draws[:draws], part.overhead)


def _knob_effects(data: StageData) -> tuple[tuple[str, ...], Floats, StageData]:
    """Log factor of each combination of knob values, and the rows with these factors divided out.

    Combinations are compared at the settings that they share: the factor is the mean over settings of the log time
    against that setting's mean; a second look after the division isn't needed when the sweep is balanced.
    """
    names, which = np.unique(data.points.knobs, return_inverse=True)
    if len(names) < 2:
        return tuple(names.tolist()), np.zeros(len(names)), data
    base = Points.of(data.points.workers, data.points.vcpus, batch=data.points.batch).settings
    logs = np.log(data.wall_s)
    effects = np.zeros(len(names))
    for _ in range(20):
        shared = setting_means(logs - effects[which], base, data.weights)
        effects = setting_means(logs - shared[base], which, data.weights)
    factor = np.exp(effects[which])
    plain = Points.of(
        data.points.workers, data.points.vcpus, upstream=data.points.upstream, items=data.points.items,
        batch=data.points.batch, features=data.points.features,
    )  # fmt: skip
    rows = StageData(plain, data.wall_s / factor, data.busy_s / factor, data.steps_s / factor[:, None], data.weights)
    return tuple(names.tolist()), effects, rows


@dataclass(frozen=True, eq=False)
class WhiteBoxLuck:
    """The runs of a white-box model.

    Attributes:
        model: What they are runs of.
        which: Number of the parameter draw of each block of runs, or of each run.
        n_samples: Runs.
        seed: Of what the parameters leave open at a point.
        noise: Log deviations of wall and busy time, ``(n_samples,)`` each.
    """

    model: WhiteBox
    which: Ints
    n_samples: int
    seed: int
    noise: Deviations

    def at(self, points: Points, runs: Ints | None = None) -> Draws:
        """What the runs, or those with these numbers, take at each point, shapes ``(n_points, n_samples)``."""
        noise, which = self.model.noise, self.which
        if runs is not None:
            which = which[runs // (self.n_samples // len(which))]
        scales, back = np.unique(noise.spread.scale(points.workers), return_inverse=True)
        drawn = []
        located = self.model.located(points, np.random.default_rng(self.seed))
        for at, every, response in zip(located, self.noise, RESPONSES, strict=True):
            deviations = every if runs is None else every[runs]
            factors = np.exp(_widened(deviations, noise.centre(response), scales)).astype(np.float32, copy=False)
            rows = factors if len(scales) == 1 else factors[back.ravel()]
            times = at[:, which][:, :, None] * rows.reshape(len(rows), len(which), -1)
            drawn.append(times.reshape(len(points), -1))
        wall, busy = drawn
        return Draws(wall, np.minimum(busy, wall, out=busy))

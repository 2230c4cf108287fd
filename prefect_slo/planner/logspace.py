r"""Off-menu sizes: the plan as a convex program in log variables, with what a second and a dollar are worth.

With :math:`x_i = \log d_i`, :math:`y_i = \log v_i` and :math:`f_i` the log of stage *i*'s finish, posynomial times make

    minimise    log Σ_i cost_i(x, y)
    subject to  log(e^{f_p} + m · T_i(x, y)) ≤ f_i   for every parent p,      f_i ≤ log bound

a geometric program (Boyd et al., Optimization and Engineering 8, 2007). *m* is the ratio of the percentile to the
longest path of mean times, so the program plans typical times under a bound that leaves room for noise. The bound
(less driver and margin) is the one parameter of a disciplined parametrised program: another bound is solved without
compiling again. It advises and guides; only *certify* says that a plan is feasible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from prefect_slo.errors import InvalidPlan, InvalidValue
from prefect_slo.planner.posynomials import Monomial, Posynomial, Term, fit
from prefect_slo.planner.problem import CompiledStage, Problem, percentile
from prefect_slo.units import positive

Floats = NDArray[np.floating]


_ACCURACY = {"tol_gap_abs": 1e-7, "tol_gap_rel": 1e-7, "tol_feas": 1e-7}
"""A ten-millionth: sizes are rounded to whole workers anyway, and tighter tolerances are not always reached."""


@dataclass(frozen=True)
class Advice:
    """Sizes between and beside the menu's, under the fitted formulas.

    Attributes:
        feasible: Whether the program has a solution; the sizes are empty otherwise.
        workers: By stage name.
        vcpus: By stage name.
        latency_s: Latency at the percentile.
        cost_usd: Mean cost.
        price_of_second: US dollars saved by one second more of the bound.
        elasticity: Per cent of cost saved by one per cent more of the bound.
    """

    feasible: bool
    workers: dict[str, float]
    vcpus: dict[str, float]
    latency_s: float
    cost_usd: float
    price_of_second: float
    elasticity: float


class LogSpace:
    """The program of a sampled problem; build once, solve for many bounds.

    Args:
        problem: Stages and samples; only options of its most common pool, batch and knobs are fitted.
        at: Percentile of latency.
        reference: A plan near the ones asked for: the margin between mean and percentile is taken from it.

    Raises:
        InvalidPlan: The workflow has item edges, whose pipelining the program does not know.
    """

    def __init__(self, problem: Problem, at: float, reference: Sequence[int]) -> None:
        if any(kind == "item" for stage in problem.stages for _, kind in stage.parents):
            raise InvalidPlan("edges", "after_items", "edges of kind 'all' for off-menu advice")
        self.problem = problem
        self.times, self.costs = [], []
        for i, stage in enumerate(problem.stages):
            time, cost = _fitted(problem, i, stage)
            self.times.append(time)
            self.costs.append(cost)
        self.driver = float(problem.driver.mean())
        self.margin = _margin(problem, at, reference)
        self._build()

    def solve(self, bound_s: float) -> Advice:
        """Least mean cost within a latency bound in seconds; sizes stay within the menu's range.

        Raises:
            InvalidValue: A bound that is not positive.
        """
        positive(bound_s, "bound_s")
        room = bound_s / self.margin - self.driver
        if room <= 0:
            return Advice(False, {}, {}, inf, inf, inf, inf)
        self._log_bound.value = log(room)
        self._program.solve(solver="CLARABEL", **_ACCURACY)
        if self._program.status not in ("optimal", "optimal_inaccurate"):
            return Advice(False, {}, {}, inf, inf, inf, inf)
        names = [stage.name for stage in self.problem.stages]
        workers = dict(zip(names, np.exp(self._x.value).tolist(), strict=True))
        vcpus = dict(zip(names, np.exp(self._y.value).tolist(), strict=True))
        cost = exp(float(self._program.value))
        finish = max(exp(float(value)) for value in self._f.value)
        # d log cost / d log room, then by the chain rule to seconds of the bound
        price = max(0.0, float(np.sum(self._last.dual_value)))
        second = price * cost / (room * self.margin)
        return Advice(True, workers, vcpus, (finish + self.driver) * self.margin, cost, second, second * bound_s / cost)

    def _build(self) -> None:
        cp = _cvxpy()
        stages = self.problem.stages
        n = len(stages)
        self._x, self._y, self._f = (cp.Variable(n) for _ in range(3))
        self._log_bound: Any = cp.Parameter()
        constraints: list[Any] = []
        spend: list[Any] = []
        for i, stage in enumerate(stages):
            counts, sizes = stage.workers, np.array([option.size.vcpus for option in stage.options])
            constraints += [self._x[i] >= log(counts.min()), self._x[i] <= log(counts.max())]
            constraints += [self._y[i] >= log(sizes.min()), self._y[i] <= log(sizes.max())]
            terms = self._logs(self.times[i], i)
            constraints += [
                cp.log_sum_exp(cp.hstack([*before, *terms])) <= self._f[i]
                for before in ([[self._f[p]] for p, _ in stage.parents] or [[]])
            ]
            spend += self._logs(self.costs[i], i)
        self._last: Any = self._f <= self._log_bound
        self._program: Any = cp.Problem(cp.Minimize(cp.log_sum_exp(cp.hstack(spend))), [*constraints, self._last])

    def _logs(self, posynomial: Posynomial, i: int) -> list[Any]:
        """Logs of the terms of a stage's posynomial, upstream workers spread over its parents."""
        cp = _cvxpy()
        found: list[Any] = []
        for term in posynomial.terms:
            if term.monomials[0].upstream:
                found += [
                    log(term.coefficient) + self._affine(term.monomials[0], i) + self._x[p]
                    for p, _ in self.problem.stages[i].parents
                ]
                continue
            pieces = [self._affine(monomial, i) for monomial in term.monomials]
            largest = pieces[0] if len(pieces) == 1 else cp.maximum(*pieces)
            found.append(log(term.coefficient) + largest)
        return found

    def _affine(self, monomial: Monomial, i: int) -> Any:
        return log(monomial.scale) + monomial.workers * self._x[i] + monomial.vcpus * self._y[i]


def _cvxpy() -> Any:
    """cvxpy takes most of a second to import, and only off-menu advice needs it."""
    import cvxpy

    return cvxpy


def _fitted(problem: Problem, i: int, stage: CompiledStage) -> tuple[Posynomial, Posynomial]:
    """Mean time of a stage, and its mean cost as workers × (a + b · vCPU) × time."""
    likely = _comparable(stage)
    upstream = np.array(sorted(stage.upstream) or [0], dtype=float)
    row_of = [stage.upstream[int(u)] for u in upstream] if stage.upstream else [0]
    workers = np.tile(stage.workers[likely].astype(float), len(upstream))
    vcpus = np.tile(np.array([stage.options[o].size.vcpus for o in likely]), len(upstream))
    u = np.repeat(upstream, len(likely))
    times = stage.latency.mean(axis=2, dtype=np.float64)[row_of][:, likely].ravel()
    costs = stage.mean_cost[row_of][:, likely].ravel()
    if not (times > 0).all():
        raise InvalidValue(f"{stage.name}.latency_s", 0.0, "a mean above 0 for every option")
    calls = problem.workflow[stage.name].items if problem.workflow[stage.name].fanout == "given" else None
    time = fit(workers, vcpus, u, times, calls=calls)
    rate = costs / np.maximum(time(workers, vcpus, u), 1e-12)
    hourly = fit_rate(workers, vcpus, rate)
    product = tuple(_product(a, b) for a in hourly for b in time.terms)
    error = float(np.abs(sum(term(workers, vcpus, u) for term in product) / np.maximum(costs, 1e-300) - 1).mean())
    return time, Posynomial(product, error)


def fit_rate(workers: Floats, vcpus: Floats, rate: Floats) -> tuple[Term, ...]:
    """US dollars per second of a stage as ``d·(a + b·v)`` with a, b ≥ 0, by least squares on relative error."""
    floor = np.maximum(rate, 1e-300)
    basis = np.stack([workers, workers * vcpus], axis=1) / floor[:, None]
    scale = np.linalg.norm(basis, axis=0)
    a, b = nnls(basis / scale, np.ones(len(rate)))[0] / scale
    pairs = ((a, Monomial(1.0, 1.0, 0.0)), (b, Monomial(1.0, 1.0, 1.0)))
    return tuple(Term(float(c), (monomial,)) for c, monomial in pairs if c > 0)


def _product(rate: Term, time: Term) -> Term:
    factor = rate.monomials[0]
    return Term(
        rate.coefficient * time.coefficient,
        tuple(
            Monomial(m.scale * factor.scale, m.workers + factor.workers, m.vcpus + factor.vcpus, m.upstream)
            for m in time.monomials
        ),
    )


def _comparable(stage: CompiledStage) -> list[int]:
    """Options that share the most common pool, hardware, batch and knobs: the others are other formulas."""
    kinds = [(o.pool, o.size.kind, o.batch, o.knobs) for o in stage.options]
    common = max(dict.fromkeys(kinds), key=kinds.count)
    return [at for at, kind in enumerate(kinds) if kind == common]


def _margin(problem: Problem, at: float, reference: Sequence[int]) -> float:
    latency = problem.latency(reference)
    flat = [stage.latency.mean(axis=2) for stage in problem.stages]
    finish = np.zeros(len(flat))
    for i, stage in enumerate(problem.stages):
        start = max((finish[p] for p, _ in stage.parents), default=0.0)
        finish[i] = start + flat[i][problem.upstream_row(i, reference), reference[i]]
    high = percentile(latency, int((1 - at) * problem.n_samples))
    return high / (float(finish.max()) + float(problem.driver.mean()))

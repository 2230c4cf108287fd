"""What a user promises: a latency bound, a budget, or both.

A latency bound asks for the least mean cost subject to the percentile of latency; a budget asks for the least
percentile of latency subject to the percentile of cost; both ask for the first with the second as a constraint.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from prefect_slo import units
from prefect_slo.errors import InvalidValue


@dataclass(frozen=True)
class Latency:
    """A bound on a percentile of the latency of one flow run.

    Args:
        bound_s: The bound: seconds, ``"30s"`` or a ``timedelta``.
        percentile: Fraction of runs that must keep it.
        confidence: How sure the plan must be that they do.

    Raises:
        InvalidValue: A bound that is not positive, a percentile or confidence outside (0, 1).
    """

    bound_s: float
    percentile: float = 0.95
    confidence: float = 0.99

    def __init__(self, bound_s: float | str | timedelta, percentile: float = 0.95, confidence: float = 0.99) -> None:
        object.__setattr__(self, "bound_s", units.seconds(bound_s, field="latency"))
        object.__setattr__(self, "percentile", units.fraction(percentile, "percentile"))
        object.__setattr__(self, "confidence", units.fraction(confidence, "confidence"))

    def __str__(self) -> str:
        return f"p{100 * self.percentile:g} latency <= {self.bound_s:g} s"


@dataclass(frozen=True)
class Budget:
    """A bound on a percentile of the cost of one flow run.

    Args:
        bound_usd: The bound: US dollars or ``"$0.02"``.
        percentile: Fraction of runs that must keep it.
        confidence: How sure the plan must be that they do.

    Raises:
        InvalidValue: A bound that is not positive, a percentile or confidence outside (0, 1).
    """

    bound_usd: float
    percentile: float = 0.95
    confidence: float = 0.99

    def __init__(self, bound_usd: float | str, percentile: float = 0.95, confidence: float = 0.99) -> None:
        object.__setattr__(self, "bound_usd", units.dollars(bound_usd))
        object.__setattr__(self, "percentile", units.fraction(percentile, "percentile"))
        object.__setattr__(self, "confidence", units.fraction(confidence, "confidence"))

    def __str__(self) -> str:
        return f"p{100 * self.percentile:g} cost <= ${self.bound_usd:g}"


@dataclass(frozen=True)
class Slo:
    """A latency bound, a budget, or both.

    Raises:
        InvalidValue: Neither is given, or the two disagree on percentile or confidence.
    """

    latency: Latency | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        for name, kind in (("latency", Latency), ("budget", Budget)):
            if not isinstance(getattr(self, name), (kind, type(None))):
                raise InvalidValue(f"slo.{name}", getattr(self, name), f"{kind.__name__}(...)")
        if self.latency is None and self.budget is None:
            raise InvalidValue("slo", None, "a latency bound such as latency='30s', a budget_usd, or both")
        if self.latency and self.budget:
            for field in ("percentile", "confidence"):
                ours, theirs = getattr(self.latency, field), getattr(self.budget, field)
                if ours != theirs:
                    raise InvalidValue(f"budget.{field}", theirs, f"the same as the latency bound's, {ours:g}")

    @classmethod
    def of(cls, objective: Latency | Budget | Slo) -> Slo:
        """Any objective as an ``Slo``."""
        if isinstance(objective, Latency):
            return cls(latency=objective)
        if isinstance(objective, Budget):
            return cls(budget=objective)
        if isinstance(objective, Slo):
            return objective
        raise InvalidValue("objective", objective, "Latency(...), Budget(...) or Slo(...)")

    @property
    def bound(self) -> Latency | Budget:
        """The bound that leads: latency where given, else the budget."""
        leading = self.latency or self.budget
        assert leading is not None  # __post_init__ holds it
        return leading

    @property
    def percentile(self) -> float:
        return self.bound.percentile

    @property
    def confidence(self) -> float:
        return self.bound.confidence

    def __str__(self) -> str:
        return " and ".join(str(bound) for bound in (self.latency, self.budget) if bound)


Objective = Latency | Budget | Slo

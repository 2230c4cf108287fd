"""How data passes along one edge of a workflow, as a plan has chosen it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from prefect_slo.errors import InvalidPlan
from prefect_slo.units import finite, items, text

Method = Literal["machine", "direct", "remote", "inline"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Way:
    """One way for data to pass, and what it is predicted to take.

    Attributes:
        method: ``machine``: memory that processes of one machine share; ``direct``: from worker to worker; ``remote``:
            over storage; ``inline``: in the request and the reply.
        seconds: Expected time of all transfers of the edge, weighed by the chance that a run takes it.
        cost_usd: Expected cost: requests to storage, and workers that wait.
    """

    method: Method
    seconds: float
    cost_usd: float

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidPlan("plan.passing.method", self.method, f"one of {', '.join(METHODS)}")
        for name in ("seconds", "cost_usd"):
            object.__setattr__(self, name, finite(getattr(self, name), f"plan.passing.{name}"))


@dataclass(frozen=True)
class EdgePlan:
    """How one stage hands its results to another.

    Attributes:
        source: Stage that makes them.
        sink: Stage that takes them.
        chosen: The way.
        size_mb: All that the source makes in a run; 0 where it is not known.
        broadcast: Whether every call of the sink takes all of it, and not just a share.
        others: The other ways that there are, fastest first.
        why: What was chosen and when another way would be, in words.
    """

    source: str
    sink: str
    chosen: Way
    size_mb: float = 0.0
    broadcast: bool = False
    others: tuple[Way, ...] = ()
    why: str = ""

    def __post_init__(self) -> None:
        text(self.source, "plan.passing.source")
        text(self.sink, "plan.passing.sink")
        if not isinstance(self.chosen, Way):
            raise InvalidPlan("plan.passing.chosen", self.chosen, "Way(...)")
        object.__setattr__(self, "size_mb", finite(self.size_mb, "plan.passing.size_mb"))
        others = items(self.others, "plan.passing.others")
        if not isinstance(self.broadcast, bool) or not all(isinstance(way, Way) for way in others):
            raise InvalidPlan("plan.passing", (self.broadcast, self.others), "true or false, and ways")
        object.__setattr__(self, "others", tuple(others))

    @property
    def method(self) -> Method:
        """The way chosen."""
        return self.chosen.method

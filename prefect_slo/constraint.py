"""Structural constraints: what the choices of one stage may be, given another's or a number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from prefect_slo.errors import InvalidWorkflow
from prefect_slo.resources import Option
from prefect_slo.units import finite, text

_CONSTRAINT = re.compile(
    r"\s*(?P<left>\S.*)\.(?P<what>workers|memory_mb|vcpus|batch)\s*(?P<op><=|>=|==|=)\s*"
    r"(?:(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?)|(?P<right>\S.*)\.(?P<same>\w+))\s*"
)


@dataclass(frozen=True)
class Constraint:
    """A relation between the choices of two stages, or of a stage and a number: ``merge.workers <= train.workers``.

    Raises:
        InvalidWorkflow: A choice or an operator that there is not.
    """

    left: str
    what: str
    op: Literal["<=", ">=", "=="]
    right: str | float

    def __post_init__(self) -> None:
        text(self.left, "constraint.left")
        if self.what not in ("workers", "memory_mb", "vcpus", "batch"):
            raise InvalidWorkflow("constraint.what", self.what, "workers, memory_mb, vcpus or batch")
        if self.op not in ("<=", ">=", "=="):
            raise InvalidWorkflow("constraint.op", self.op, "<=, >= or ==")
        if not isinstance(self.right, str):
            object.__setattr__(self, "right", finite(self.right, "constraint.right"))

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """Read ``<stage>.<workers|memory_mb|vcpus|batch> <= | >= | == <stage>.<same> | <number>``.

        Raises:
            InvalidWorkflow: Text of another form.
        """
        match = _CONSTRAINT.fullmatch(text) if isinstance(text, str) and len(text) < 1000 else None
        if match is None or (match["same"] is not None and match["same"] != match["what"]):
            raise InvalidWorkflow("constraint", text, "a relation such as 'merge.workers <= train.workers'")
        op = "==" if match["op"] == "=" else match["op"]
        right = float(match["number"]) if match["number"] else match["right"]
        return cls(match["left"], match["what"], op, right)  # type: ignore[arg-type]

    @property
    def stages(self) -> tuple[str, ...]:
        return (self.left, self.right) if isinstance(self.right, str) else (self.left,)

    def holds(self, options: Mapping[str, Option]) -> bool:
        """Whether it holds; relations of stages that are not in ``options`` yet are taken to hold."""
        if any(name not in options for name in self.stages):
            return True
        left = getattr(options[self.left], self.what)
        right = getattr(options[self.right], self.what) if isinstance(self.right, str) else self.right
        return bool({"<=": left <= right, ">=": left >= right, "==": left == right}[self.op])

    def __str__(self) -> str:
        right = f"{self.right}.{self.what}" if isinstance(self.right, str) else repr(self.right)
        return f"{self.left}.{self.what} {self.op} {right}"

"""How many leases the stages of one task may hold together: a limit of the task's own, wherever in the graph it is."""

from __future__ import annotations

from collections import Counter

from prefect_slo.control.events import StageRule


class Together:
    """Counts leases by task."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()

    def fits(self, rule: StageRule) -> bool:
        """Whether a lease under that rule keeps its task's limit."""
        return rule.together is None or self._held[rule.task] < rule.together

    def take(self, rule: StageRule) -> None:
        self._held[rule.task] += 1

    def free(self, rule: StageRule) -> None:
        self._held[rule.task] -= 1

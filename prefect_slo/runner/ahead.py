"""Tells pools that grow what is coming: the workers that a plan gives its stages, before their bundles queue there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prefect_slo.control import StageRule, losses
from prefect_slo.control import events as control
from prefect_slo.control.need import Need, Needs
from prefect_slo.runner.backends.protocol import Backend, Capabilities, GrowingBackend


class Ahead:
    """What one flow run's stages are about to need, of the pools that want to know.

    Args:
        backends: By pool name.
        capabilities: Of a pool.
    """

    def __init__(self, backends: Mapping[str, Backend], capabilities: Callable[[str], Capabilities]) -> None:
        self._backends, self._capabilities = backends, capabilities
        self._rules: dict[str, StageRule] = {}
        self._needs = Needs()
        self._told: dict[str, Need] = {}

    def heard(self, event: control.Event) -> None:
        """Something has happened."""
        match event:
            case control.PlanChanged(stage, rule) if self._capabilities(rule.pool).grows:
                self._rules[stage] = rule
                self._told.setdefault(rule.pool, Need())
            case control.Submitted(stage, items, ready) if stage in self._rules:
                self._needs.submitted(stage, items, ready=ready)
            case control.Ready(items) if self._told:
                self._needs.ready(items)

    def did(self, action: control.Action) -> None:
        """Something has been done about it: a stage that falls back or grows needs something else from then on."""
        match action:
            case control.Settle(items) if self._told:
                self._needs.settled(items)
            case control.Notice(stage, "fallback") if stage in self._rules:
                self._rules[stage] = losses.fallen_back(self._rules[stage])
            case control.Notice(stage, "grown") if stage in self._rules:
                self._rules[stage] = losses.grown(self._rules[stage])

    def tell(self) -> None:
        """Tell pools what is new."""
        for pool, told in self._told.items():
            need = self._needs.of(pool, self._rules)
            backend = self._backends[pool]
            if need != told and isinstance(backend, GrowingBackend):
                self._told[pool] = need
                backend.expect(need)

"""GPUs of Kubernetes jobs: whole devices, or shares by the plugin that the cluster has.

What a share means is the plugin's: vGPU plugins take cores in hundredths and memory in units; MIG partitions a device
in hardware, and a size gets the smallest partition that holds it; time slicing takes turns and enforces nothing. Which
of them a pool has is what the variables of its base job template say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefect_slo.errors import InvalidValue
from prefect_slo.placement import Share
from prefect_slo.units import text

TURNS = "x-turns"
"""Property of a template's variable: how many turns its plugin makes of a device."""

_SLACK = 1e-6


@dataclass(frozen=True)
class GpuResource:
    """A resource of Kubernetes that is a GPU, or a part of one.

    Attributes:
        resource: Its name there.
        variable: Job variable that becomes its limit.
        per_device: Units that are one whole device; 0 where it has none.
        memory: Its companion for memory: ``resource``, ``variable`` and ``unit_mb``.
        slice: Of a hardware partition, its share of a device's cores, and its MB.
        turns: Whether a unit is a turn on a device.
    """

    resource: str
    variable: str
    per_device: int = 0
    memory: Mapping[str, Any] = field(default_factory=dict)
    slice: tuple[float, float] | None = None
    turns: bool = False

    def __post_init__(self) -> None:
        text(self.resource, "sizing.gpus.resource")
        text(self.variable, "sizing.gpus.variable")
        if self.slice is not None:
            object.__setattr__(self, "slice", tuple(self.slice))

    @property
    def names(self) -> dict[str, str]:
        """Its resources by job variable."""
        companion = {self.memory["variable"]: self.memory["resource"]} if self.memory else {}
        return {self.variable: self.resource, **companion}

    def units(self, share: Share, turns: int) -> dict[str, int] | None:
        """Job variables of a share; ``None`` where this resource can't give it.

        Args:
            share: What a worker asks for.
            turns: Turns on a device; 0 where nobody has said.
        """
        if self.slice is not None:
            return {self.variable: 1} if self._holds(share) else None
        if self.turns:
            one_turn = share.gpu < 1 and not share.memory_mb and turns and share.gpu <= 1 / turns + _SLACK
            return {self.variable: 1} if one_turn else None
        if not self.memory:
            return {self.variable: round(share.gpu * self.per_device)} if share.gpu >= 1 else None
        if share.gpu < 1 and not share.memory_mb:
            return None
        told = {self.variable: math.ceil(share.gpu * self.per_device - _SLACK)}
        if share.memory_mb:
            told[self.memory["variable"]] = math.ceil(share.memory_mb / self.memory["unit_mb"] - _SLACK)
        return told

    def _holds(self, share: Share) -> bool:
        assert self.slice is not None
        cores, memory_mb = self.slice
        return share.gpu <= cores + _SLACK and share.memory_mb <= memory_mb


def told(resources: Sequence[GpuResource], properties: Mapping[str, Any], share: Share) -> dict[str, int]:
    """Job variables of a share, by the first of the resources that the template has and that can give it.

    Whole devices come first, then partitions, which are enforced by the hardware, smallest first.

    Args:
        resources: That there may be.
        properties: Variables of the base job template.
        share: What a worker asks for.

    Raises:
        InvalidValue: None of those that the template has can give it.
    """
    there = [resource for resource in resources if resource.names.keys() <= properties.keys()]
    for resource in sorted(there, key=_preference):
        found = resource.units(share, int(properties[resource.variable].get(TURNS, 0)))
        if found is not None:
            return found
    has = ", ".join(_said(resource, properties) for resource in there) or "no resource for GPUs"
    raise InvalidValue("size.gpu", str(share), f"a share that the job template has a resource for; it has {has}")


def _preference(resource: GpuResource) -> tuple[int, tuple[float, float]]:
    shared = resource.turns or bool(resource.memory)
    return (1 if resource.slice else 2 if shared else 0), resource.slice or (0.0, 0.0)


def _said(resource: GpuResource, properties: Mapping[str, Any]) -> str:
    if resource.slice is not None:
        return f"{resource.resource} (at most {resource.slice[0]:.2g} of a GPU and {resource.slice[1]:,.0f} MB)"
    if resource.turns:
        turns = int(properties[resource.variable].get(TURNS, 0))
        most = f"at most 1/{turns} of a GPU, and no say in memory" if turns else "turns that its variable does not say"
        return f"{resource.resource} ({most})"
    if resource.memory:
        return f"{resource.resource} (shares with gpu_memory_mb, in steps of {resource.memory['unit_mb']} MB)"
    return f"{resource.resource} (whole GPUs)"

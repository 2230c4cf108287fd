"""What the leases of one run may hold together, pool by pool."""

from __future__ import annotations

from collections.abc import Mapping

_SLACK = 1e-9


class Room:
    """Counts the vCPUs that leases hold on every pool.

    Args:
        capacity: vCPUs by pool; ``None`` or a missing pool means no limit. Other runs are the backend's matter.
    """

    def __init__(self, capacity: Mapping[str, float | None]) -> None:
        self._capacity = dict(capacity)
        self._held: dict[str, float] = {}

    def fits(self, pool: str, vcpus: float) -> bool:
        """Whether a lease of that many vCPUs fits now. One larger than the whole pool fits alone."""
        limit = self._capacity.get(pool)
        held = self._held.get(pool, 0.0)
        return limit is None or held + vcpus <= limit + _SLACK or held <= _SLACK

    def take(self, pool: str, vcpus: float) -> None:
        self._held[pool] = self._held.get(pool, 0.0) + vcpus

    def free(self, pool: str, vcpus: float) -> None:
        self._held[pool] -= vcpus

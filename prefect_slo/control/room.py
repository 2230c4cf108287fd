"""What the leases of one run may hold together, pool by pool."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from prefect_slo.resources import RESOURCES, Capacity, Size

_SLACK = 1e-9


class Room:
    """Counts what leases hold on every pool.

    Args:
        capacity: By pool; a missing pool means no limit. Other runs are the backend's matter.
    """

    def __init__(self, capacity: Mapping[str, Capacity]) -> None:
        self._limits = {
            pool: {name: limit for name in RESOURCES if (limit := own.limit(name)) is not None}
            for pool, own in capacity.items()
        }
        self._held: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._leases: Counter[str] = Counter()

    def fits(self, pool: str, size: Size) -> bool:
        """Whether a lease of that size fits now. One larger than the whole pool fits alone."""
        limits = self._limits.get(pool)
        if not limits or not self._leases[pool]:
            return True
        return all(self._held[pool, name] + _share(size, name) <= limit + _SLACK for name, limit in limits.items())

    def take(self, pool: str, size: Size) -> None:
        self._count(pool, size, 1)

    def free(self, pool: str, size: Size) -> None:
        self._count(pool, size, -1)

    def _count(self, pool: str, size: Size, leases: int) -> None:
        self._leases[pool] += leases
        for name in self._limits.get(pool, ()):
            self._held[pool, name] += leases * _share(size, name)


def _share(size: Size, resource: str) -> float:
    return 1.0 if resource == "workers" else float(getattr(size, resource))

"""What the backend of clusters asks of a cluster's client: Dask's and Ray's each answer it in a module of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from prefect_slo.control.need import Need
from prefect_slo.resources import Size
from prefect_slo.runner.backends.remote import Reply, Work

Fetch = Callable[[], Reply | str]
"""The reply of a bundle, or in words why there is none; raises what the cluster raises."""


class Cluster(Protocol):
    """What is asked of a cluster's client.

    Attributes:
        own: Whether ``connect`` starts it, for this run.
    """

    own: bool

    def connect(self) -> None:
        """Reach the cluster, or start one."""
        ...

    def lack(self, size: Size) -> str:
        """Why no worker that the cluster has could ever take a size; empty where one could, or none is there yet."""
        ...

    def vacant(self) -> str:
        """In words that it has no worker at all, and what to do; empty where it has one."""
        ...

    def workers(self) -> frozenset[str]:
        """Names of the workers that it has: ``Reply.worker`` of what runs there."""
        ...

    def expect(self, need: Need) -> None:
        """Have room for these workers, where the cluster grows."""
        ...

    def start(self, work: Work, parts: Sequence[Any], done: Callable[[Fetch], None]) -> Any:
        """Have a bundle run once, never twice, near the parts that it takes; returns a handle.

        ``done`` is called from any thread when it is over. ``Left`` parts of its outcomes are handles by then.
        """
        ...

    def fetch(self, part: Any) -> bytes:
        """Bring a part here; from any thread."""
        ...

    def gone(self, part: Any) -> str:
        """In words why a part can't be had any more, as far as that is known; empty where it can."""
        ...

    def never_ran(self, handle: Any, error: Exception | None) -> bool:
        """Whether a bundle that ended without a reply, by an error of the cluster's, has certainly not begun."""
        ...

    def turns(self, token: str) -> list[float] | None:
        """When a bundle that was lost had its turn, in seconds since the epoch; empty where it had none.

        ``None`` where the cluster keeps no account of that.
        """
        ...

    def end(self, handle: Any) -> Literal["told", "begun", "unbegun"]:
        """End a bundle. ``told``: it is over when ``done`` is called; else it is, and this says if it had begun."""
        ...

    def close(self, run_key: str) -> None:
        """Leave nothing of a run behind, and end what ``connect`` started."""
        ...

"""Whether this code runs inside a worker: there, nested submits run at once, in place.

A worker that waited for items of its own flow run could wait for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_INLINE: ContextVar[bool] = ContextVar("prefect_slo_inline", default=False)
_worker_process = False


def enter_worker() -> None:
    """This whole process is a worker, from now on."""
    global _worker_process
    _worker_process = True


@contextmanager
def inline() -> Iterator[None]:
    """Inside, this context is a worker's."""
    token = _INLINE.set(True)
    try:
        yield
    finally:
        _INLINE.reset(token)


def is_worker() -> bool:
    """Whether nested submits run in place."""
    return _worker_process or _INLINE.get()

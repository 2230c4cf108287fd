"""Pickles arguments for workers without Prefect: what lies elsewhere, and what is large, beside them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
from prefect.futures import PrefectFutureList

from prefect_slo.runner.backends.protocol import Kept, NotSent
from prefect_slo.runner.elsewhere import Elsewhere
from prefect_slo.runner.payloads import by_value

_PLAIN = frozenset({int, float, str, bytes, bool, type(None)})

APART_BYTES = 2**20
"""A value of at least this size among arguments goes beside them, so that it need travel once for several calls."""


@dataclass
class Parts:
    """What the arguments of some calls refer to by number.

    Attributes:
        all: In order.
    """

    all: list[bytes | Kept] = field(default_factory=list)
    _numbers: dict[bytes | int, int] = field(default_factory=dict)

    def number(self, part: bytes | Kept) -> int:
        """Of a part; equal bytes are one."""
        name = part if isinstance(part, bytes) else id(part)
        if name not in self._numbers:
            self._numbers[name] = len(self.all)
            self.all.append(part)
        return self._numbers[name]


def dump_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], parts: Parts) -> bytes:
    """Arguments, pickled; what lies elsewhere, and values that are large, are references to ``parts``.

    Raises:
        NotSent: They can't be pickled.
    """
    values = (*args, *kwargs.values())
    try:
        with nullcontext() if _PLAIN.issuperset(map(type, values)) else by_value():
            whole = _by_itself((args, kwargs))
            if whole is not None and len(whole) < APART_BYTES:
                return whole
            apart = _large(values)
            shared = whole is not None and sum(map(len, apart.values())) - len(whole) >= APART_BYTES
            if whole is not None and (shared or not apart):
                return whole
            buffer = io.BytesIO()
            _Referring(buffer, parts, apart).dump((args, kwargs))
            return buffer.getvalue()
    except Exception as error:
        raise NotSent(f"{type(error).__name__}: {error}") from error


def _large(values: Sequence[Any]) -> dict[int, bytes]:
    """Values that are large by themselves, by ``id``, pickled; one that holds what lies elsewhere is none."""
    pickled = ((value, _by_itself(value)) for value in {id(value): value for value in values}.values())
    return {id(value): dumped for value, dumped in pickled if dumped is not None and len(dumped) >= APART_BYTES}


def _by_itself(value: Any) -> bytes | None:
    """A value, pickled; ``None`` where it holds what lies elsewhere."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer).dump(value)
    except _HoldsElsewhere:
        return None
    return buffer.getvalue()


class _HoldsElsewhere(Exception):
    """Something that lies elsewhere, where nothing can refer to it."""


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles what was a list of futures as the list of results that it has become: there is no Prefect over there."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is PrefectFutureList:
            return list, (list(obj),)
        if type(obj) is Elsewhere:
            raise _HoldsElsewhere
        return super().reducer_override(obj)


class _Referring(_Pickler):
    """Pickles what lies elsewhere, and by ``id`` values that are ``apart``, as references to ``parts``.

    It is asked about every object, which costs several times as much as pickling small ones.
    """

    def __init__(self, buffer: io.BytesIO, parts: Parts, apart: Mapping[int, bytes]) -> None:
        super().__init__(buffer)
        self._parts = parts
        self._apart = {name: (parts.number(value), at) for at, (name, value) in enumerate(apart.items())}

    def persistent_id(self, obj: Any) -> tuple[int, int] | None:
        if type(obj) is Elsewhere:
            return self._parts.number(obj.kept), 0
        return self._apart.get(id(obj))

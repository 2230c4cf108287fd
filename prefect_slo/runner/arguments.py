"""Pickles arguments for workers without Prefect: what lies elsewhere, and what is large, beside them."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import date, time, timedelta, tzinfo
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import cached_property
from math import inf
from pathlib import PurePath
from sys import getsizeof
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GenericAlias,
    MappingProxyType,
    ModuleType,
    UnionType,
)
from typing import Any
from uuid import UUID
from weakref import WeakValueDictionary

import cloudpickle
import numpy as np
from prefect.futures import PrefectFutureList

from prefect_slo.runner.backends.protocol import Apart, Kept, NotSent
from prefect_slo.runner.elsewhere import Elsewhere
from prefect_slo.runner.exceptions import without_constructor
from prefect_slo.runner.payloads import by_value

_PLAIN = frozenset({int, float, str, bytes, bool, type(None)})

_ALIKE = (
    *(bool, int, float, complex, str, bytes, tuple, frozenset, range, slice, Decimal, Fraction, UUID),
    *(date, time, timedelta, tzinfo, PurePath, Enum, np.dtype, np.number, np.bool_, np.datetime64),
    *(type, FunctionType, BuiltinFunctionType, CodeType, ModuleType, property, staticmethod, classmethod),
    *(GenericAlias, UnionType, MappingProxyType),
)
"""What two copies are as good as one of: what changes never, and what is defined once."""

_DEFINING = ("dataclasses", "typing")
"""Modules whose objects say what a class is like."""

_GENERATING = ("dataclasses", "reprlib")
"""Modules that make methods for classes."""

APART_BYTES = 2**20
"""A value of at least this size among arguments goes beside them, so that it need travel once for several calls."""

_TAKEN: WeakValueDictionary[str, Apart] = WeakValueDictionary()
_TAKING = threading.Lock()


@dataclass
class Parts:
    """What the arguments of some calls refer to by number.

    Attributes:
        all: In order.
    """

    all: list[Apart | Kept] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)

    def number(self, part: Apart | Kept) -> int:
        """Of a part."""
        if id(part) not in self._numbers:
            self._numbers[id(part)] = len(self.all)
            self.all.append(part)
        return self._numbers[id(part)]

    def cut(self, count: int) -> None:
        """Drop all but so many parts: nothing refers to the others after all."""
        for part in self.all[count:]:
            del self._numbers[id(part)]
        del self.all[count:]


def dump_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], parts: Parts) -> bytes:
    """Arguments, pickled; what lies elsewhere, and values that are large, are references to ``parts``.

    Values that have something in common that may change are pickled together, however large they are: it is one thing
    on the worker, too.

    Raises:
        NotSent: They can't be pickled.
    """
    values = (*args, *kwargs.values())
    try:
        with nullcontext() if _PLAIN.issuperset(map(type, values)) else by_value():
            apart = _large([value for value in values if _looks_large(value)])
            split = _split(args, kwargs, parts, apart, most=APART_BYTES)
            if split is not None:  # most often: then nothing large is pickled twice
                return split
            whole = _by_itself((args, kwargs))
            if whole is not None and len(whole.content) < APART_BYTES:
                return whole.content
            apart |= _large([value for value in values if id(value) not in apart])
            split = _split(args, kwargs, parts, apart)
            if split is not None:
                return split
            return whole.content if whole is not None else _referring(args, kwargs, parts, {}).content
    except Exception as error:
        raise NotSent(f"{type(error).__name__}: {error}") from error


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any], parts: Parts, apart: Mapping[int, _Pickled], most: float = inf
) -> bytes | None:
    """Arguments with values ``apart``; ``None`` where there are none, they have to stay, or the rest takes ``most``.

    They have to stay where they have something in common that may change, or that is large.
    """
    if not apart:
        return None
    before = len(parts.all)
    referring = _referring(args, kwargs, parts, apart)
    values = [*apart.values()]
    if len(referring.content) < most and not _have_in_common(referring, values, kwargs):
        simple = len(values) == 1 and len(referring.content) < APART_BYTES  # nothing large is in both
        if simple or _repeated([referring, *values]) < APART_BYTES:
            return referring.content
    parts.cut(before)
    return None


def _taken(content: bytes) -> Apart:
    """A pickled value: one object for equal ones, as long as a call takes it, so that there is one copy in memory."""
    sha = hashlib.sha256(content).hexdigest()
    with _TAKING:
        return _TAKEN.setdefault(sha, Apart(sha, content))


def _looks_large(value: Any) -> bool:
    """Whether a value may well be large, as far as can be told without pickling it."""
    try:
        if isinstance(value, str | bytes | bytearray):
            return len(value) >= APART_BYTES
        if isinstance(size := getattr(value, "nbytes", None), int):  # arrays, tensors, tables of Arrow
            return size >= APART_BYTES
        if isinstance(size := getattr(value, "size", None), int):  # tables of pandas: how many values
            return 8 * size >= APART_BYTES
        return isinstance(value, Sized) and 8 * len(value) >= APART_BYTES
    except Exception:  # it can't be told, by whatever its class has made of this
        return False


@dataclass(frozen=True)
class _Pickled:
    """A pickle, and what has made it: that keeps alive what the pickle holds."""

    content: bytes
    pickler: _Pickler

    @cached_property
    def held(self) -> dict[int, Any]:
        """Objects that the pickle holds, however often it refers to each, by ``id``; numbers are none."""
        return {id(one): one for _, one in self.pickler.memo.copy().values()}

    @cached_property
    def changeable(self) -> set[int]:
        """Those of them that may change, by ``id``."""
        held = self.held.values()
        defined = {id(part) for one in held for part in _definition(one)}
        changes = (one for one in held if not issubclass(type(one), _ALIKE) and type(one).__module__ not in _DEFINING)
        return {id(one) for one in changes} - defined


def _definition(found: Any) -> Iterator[Any]:
    """What a function or class is made of that nobody changes; it is pickled along where that travels by value."""
    if isinstance(found, type):
        yield from (value for name, value in vars(found).items() if name.startswith("__") and name.endswith("__"))
    elif isinstance(found, FunctionType):
        yield from (found.__annotations__, found.__kwdefaults__)
        if not vars(found):
            yield vars(found)
        generated = found.__globals__.get("__name__") in _GENERATING
        for cell in found.__closure__ or ():
            content = _content(cell)
            if generated or isinstance(content, type | FunctionType) or type(content).__module__ in _DEFINING:
                yield cell
            if generated:
                yield content


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _have_in_common(beside: _Pickled, apart: Sequence[_Pickled], kwargs: dict[str, Any]) -> bool:
    """Whether pickles hold one object, of which a worker would have a copy from each."""
    seen = beside.changeable - {id(kwargs)}
    if not seen and len(apart) == 1:
        return False
    for one in apart:
        held = one.changeable
        if not seen.isdisjoint(held):
            return True
        seen |= held
    return False


def _repeated(pickles: Sequence[_Pickled]) -> int:
    """About how many bytes more pickles take than one of them all would: of what several hold, and never changes."""
    seen, size = set[int](), 0
    for one in pickles:
        size += sum(getsizeof(one.held[name]) for name in one.held.keys() & seen)
        seen |= one.held.keys()
    return size


def _large(values: Sequence[Any]) -> dict[int, _Pickled]:
    """Values that are large by themselves, by ``id``, pickled; one that holds what lies elsewhere is none."""
    pickled = ((value, _by_itself(value)) for value in {id(value): value for value in values}.values())
    return {id(value): one for value, one in pickled if one is not None and len(one.content) >= APART_BYTES}


def _by_itself(value: Any) -> _Pickled | None:
    """A value, pickled; ``None`` where it holds what lies elsewhere."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    try:
        pickler.dump(value)
    except _HoldsElsewhere:
        return None
    return _Pickled(buffer.getvalue(), pickler)


def _referring(args: tuple[Any, ...], kwargs: dict[str, Any], parts: Parts, apart: Mapping[int, _Pickled]) -> _Pickled:
    """Arguments, pickled with references to ``parts`` for what lies elsewhere and, by ``id``, values ``apart``."""
    buffer = io.BytesIO()
    pickler = _Referring(buffer, parts, {name: one.content for name, one in apart.items()})
    pickler.dump((args, kwargs))
    return _Pickled(buffer.getvalue(), pickler)


class _HoldsElsewhere(Exception):
    """Something that lies elsewhere, where nothing can refer to it."""


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles lists of futures as the lists of results that they have become, and exceptions by Python's own means.

    There is no Prefect over there, nor this package.
    """

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is PrefectFutureList:
            return list, (list(obj),)
        if type(obj) is Elsewhere:
            raise _HoldsElsewhere
        if isinstance(obj, BaseException) and (reduced := without_constructor(obj)) is not None:
            return reduced
        return super().reducer_override(obj)


class _Referring(_Pickler):
    """Pickles what lies elsewhere, and by ``id`` values that are ``apart``, as references to ``parts``.

    It is asked about every object, which costs several times as much as pickling small ones.
    """

    def __init__(self, buffer: io.BytesIO, parts: Parts, apart: Mapping[int, bytes]) -> None:
        super().__init__(buffer)
        self._parts = parts
        self._apart = {name: (parts.number(_taken(value)), at) for at, (name, value) in enumerate(apart.items())}

    def persistent_id(self, obj: Any) -> tuple[int, int] | None:
        if type(obj) is Elsewhere:
            return self._parts.number(obj.kept), 0
        return self._apart.get(id(obj))

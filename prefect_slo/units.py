"""Durations, money and memory as people write them, turned into seconds, US dollars and megabytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from numbers import Integral, Real
from typing import Any, TypeVar

from prefect_slo.errors import InvalidValue

_T = TypeVar("_T")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_MEGABYTES = {"mb": 1.0, "mib": 1.0, "m": 1.0, "gb": 1024.0, "gib": 1024.0, "g": 1024.0}
_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]+)\s*")


def seconds(value: float | str | timedelta, *, field: str = "latency") -> float:
    """Seconds from ``30``, ``30.5``, ``"30s"``, ``"1m30s"``, ``"250ms"`` or a ``timedelta``.

    Raises:
        InvalidValue: Not a positive, finite duration.

    >>> seconds("1m30s")
    90.0
    """
    if isinstance(value, timedelta):
        return positive(value.total_seconds(), field)
    if isinstance(value, str):
        return _quantities(value, _SECONDS, field, "a positive duration such as '30s', '1m30s' or 12.5")
    return positive(value, field)


def dollars(value: float | str, *, field: str = "budget_usd") -> float:
    """US dollars from ``0.02`` or ``"$0.02"``.

    Raises:
        InvalidValue: Not a positive, finite amount.
    """
    if isinstance(value, str):
        bare = value.strip().removeprefix("$").removesuffix("USD").strip()
        return _quantities(bare, {}, field, "a positive amount such as 0.02 or '$0.02'", shown=value)
    return positive(value, field)


def megabytes(value: float | str, *, field: str = "memory_mb") -> int:
    """Whole megabytes (MiB) from ``512``, ``"512MB"`` or ``"2GB"``.

    Raises:
        InvalidValue: Not a positive, finite size.
    """
    if isinstance(value, str):
        value = _quantities(value, _MEGABYTES, field, "a positive size such as 512, '512MB' or '2GB'")
    return math.ceil(positive(value, field))


def positive(value: object, field: str) -> float:
    """``value`` as a float when it is a finite number above 0.

    Raises:
        InvalidValue: Anything else, booleans included.
    """
    number = finite(value, field)
    if number <= 0:
        raise InvalidValue(field, value, "a number above 0")
    return number


def finite(value: object, field: str) -> float:
    """``value`` as a float when it is a finite number; numpy's scalars are numbers too.

    Raises:
        InvalidValue: Anything else, booleans included.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidValue(field, value, "a finite number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidValue(field, value, "a finite number")
    return number


def fraction(value: object, field: str) -> float:
    """``value`` as a float when it lies strictly between 0 and 1.

    Raises:
        InvalidValue: Anything else; 95 is taken for the common slip of percent for fraction.
    """
    number = finite(value, field)
    if not 0 < number < 1:
        hint = f" (did you mean {number / 100:g}?)" if 1 < number < 100 else ""
        raise InvalidValue(field, value, f"a fraction strictly between 0 and 1, such as 0.95{hint}")
    return number


def whole(value: object, field: str, *, least: int = 1) -> int:
    """``value`` as an int when it is a whole number of at least ``least``.

    Raises:
        InvalidValue: Anything else, booleans included.
    """
    number = finite(value, field)
    if number != math.floor(number) or number < least:
        raise InvalidValue(field, value, f"a whole number of at least {least}")
    return int(value) if isinstance(value, Integral) else int(number)


def text(value: object, field: str) -> str:
    """``value`` when it is a text that is not blank.

    Raises:
        InvalidValue: Anything else.
    """
    if not isinstance(value, str) or not value.strip():
        raise InvalidValue(field, value, "a text that is not empty")
    return value


def items(value: object, field: str) -> tuple[Any, ...]:
    """The elements of a list, tuple or other sequence.

    Raises:
        InvalidValue: No sequence; a text is none, so that ``"8"`` isn't taken for ``["8"]``.
    """
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        try:
            return tuple(value)
        except TypeError:  # numpy's 0-d arrays say that they are iterable and are not
            pass
    raise InvalidValue(field, value, "a list")


def instances(kind: type[_T], value: object, field: str) -> tuple[_T, ...]:
    """The elements of a sequence, each of which is a ``kind``.

    Raises:
        InvalidValue: No sequence, or something else in it.
    """
    elements = items(value, field)
    for element in elements:
        if not isinstance(element, kind):
            raise InvalidValue(field, element, f"a list of {kind.__name__}(...)")
    return elements


def _quantities(text: str, units: Mapping[str, float], field: str, expected: str, *, shown: str | None = None) -> float:
    """Sum of the ``number unit`` pairs that make up ``text``, above 0; a bare number counts in the base unit."""
    refused = InvalidValue(field, text if shown is None else shown, expected)
    if len(text) > 100:
        raise refused
    try:
        total = float(text)
    except ValueError:
        total, position = 0.0, 0
        while position < len(text):
            match = _QUANTITY.match(text, position)
            if match is None or match[2].lower() not in units:
                raise refused from None
            total += float(match[1]) * units[match[2].lower()]
            position = match.end()
    if not 0 < total < math.inf:
        raise refused
    return total

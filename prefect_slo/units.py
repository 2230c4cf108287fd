"""Durations, money and memory as people write them, turned into seconds, US dollars and megabytes."""

from __future__ import annotations

import math
import re
from datetime import timedelta

from prefect_slo.errors import InvalidValue

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
        return positive(_quantities(value, _SECONDS, field, "a duration such as '30s', '1m30s' or 12.5"), field)
    return positive(value, field)


def dollars(value: float | str, *, field: str = "budget_usd") -> float:
    """US dollars from ``0.02`` or ``"$0.02"``.

    Raises:
        InvalidValue: Not a positive, finite amount.
    """
    if isinstance(value, str):
        try:
            value = float(value.strip().removeprefix("$").removesuffix("USD").strip())
        except ValueError:
            raise InvalidValue(field, value, "an amount such as 0.02 or '$0.02'") from None
    return positive(value, field)


def megabytes(value: float | str, *, field: str = "memory_mb") -> int:
    """Whole megabytes (MiB) from ``512``, ``"512MB"`` or ``"2GB"``.

    Raises:
        InvalidValue: Not a positive, finite size.
    """
    if isinstance(value, str):
        value = _quantities(value, _MEGABYTES, field, "a size such as 512, '512MB' or '2GB'")
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
    """``value`` as a float when it is a finite number.

    Raises:
        InvalidValue: Anything else, booleans included.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidValue(field, value, "a finite number")
    return float(value)


def fraction(value: object, field: str) -> float:
    """``value`` as a float when it lies strictly between 0 and 1.

    Raises:
        InvalidValue: Anything else; 95 is taken for the common slip of percent for fraction.
    """
    number = finite(value, field)
    if not 0 < number < 1:
        hint = f"; did you mean {number / 100:g}?" if 1 <= number < 100 else ""
        raise InvalidValue(field, value, f"a fraction strictly between 0 and 1, such as 0.95{hint}")
    return number


def whole(value: object, field: str, *, least: int = 1) -> int:
    """``value`` as an int when it is a whole number of at least ``least``.

    Raises:
        InvalidValue: Anything else, booleans included.
    """
    number = finite(value, field)
    if number != int(number) or number < least:
        raise InvalidValue(field, value, f"a whole number of at least {least}")
    return int(number)


def _quantities(text: str, units: dict[str, float], field: str, expected: str) -> float:
    """Sum of the ``number unit`` pairs that make up ``text``; a bare number counts in the base unit."""
    try:
        return float(text)
    except ValueError:
        pass
    total, position = 0.0, 0
    while position < len(text):
        match = _QUANTITY.match(text, position)
        if match is None or match[2].lower() not in units:
            raise InvalidValue(field, text, expected)
        total += float(match[1]) * units[match[2].lower()]
        position = match.end()
    if not text.strip():
        raise InvalidValue(field, text, expected)
    return total

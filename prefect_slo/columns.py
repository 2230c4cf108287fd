"""Columns of a table as typed arrays: what may stand in a cell, and what an empty cell means.

Numbers may come as text, for that is how CSV readers without types give them; booleans, dates and lists may not stand
for numbers. An empty cell (``None``, NaN, ``""``, pandas' ``NA``) is NaN or the column's default. Everything that can't
be read is refused with its column, row and value.
"""

from __future__ import annotations

import math
from datetime import datetime
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefect_slo.errors import InvalidObservation

_TRUE, _FALSE = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0", "")


def floats(name: str, values: object, *, instants: bool = False) -> NDArray[np.float64]:
    """Numbers of shape ``(n_rows,)``; empty cells are NaN.

    Args:
        name: Column name, for the error.
        values: Any one-dimensional sequence.
        instants: Whether dates are read as Unix times.

    Raises:
        InvalidObservation: A cell that holds no number.
    """
    raw = _raw(name, values)
    if raw.dtype.kind in "iuf":
        return raw.astype(np.float64)
    if raw.dtype.kind == "M" and instants:
        return np.where(np.isnat(raw), np.nan, raw.astype("datetime64[us]").astype(np.int64) / 1e6)
    cells: list[Any] = raw.tolist()
    return np.array([_number(name, row, cell, instants) for row, cell in enumerate(cells)], dtype=np.float64)


def wholes(name: str, values: object, default: int | None) -> NDArray[np.int64]:
    """Whole numbers of shape ``(n_rows,)``; empty cells are ``default``.

    Raises:
        InvalidObservation: A cell that holds no whole number, or is empty where there is no default.
    """
    numbers = floats(name, values)
    empty = np.isnan(numbers)
    if default is None:
        refuse(name, empty, numbers, "a whole number")
    numbers = np.where(empty, default or 0, numbers)
    refuse(name, (np.abs(numbers) > 2**53) | (numbers != np.floor(numbers)), numbers, "a whole number")
    return numbers.astype(np.int64)


def flags(name: str, values: object) -> NDArray[np.bool_]:
    """Truth values of shape ``(n_rows,)`` from booleans, 0 and 1, or ``"true"`` and ``"false"``; empty is false.

    Raises:
        InvalidObservation: A cell that holds something else.
    """
    raw = _raw(name, values)
    if raw.dtype.kind == "b":
        return raw.astype(np.bool_)
    read = np.zeros(len(raw), dtype=np.bool_)
    for row, cell in enumerate(raw.tolist()):
        word = "" if _empty(cell) else str(cell).strip().lower()
        if word not in _TRUE and word not in _FALSE:
            raise InvalidObservation(f"{name} (row {row})", cell, "true or false")
        read[row] = word in _TRUE
    return read


def names(name: str, values: object, default: str | None) -> NDArray[Any]:
    """Texts of shape ``(n_rows,)``, dtype ``object``; empty cells are ``default``.

    Raises:
        InvalidObservation: An empty cell where there is no default.
    """
    cells: list[Any] = _raw(name, values).tolist()
    for row, cell in enumerate(cells):
        if _empty(cell):
            if default is None:
                raise InvalidObservation(f"{name} (row {row})", cell, "a name")
            cells[row] = default
    return np.array([str(cell) for cell in cells], dtype=object)


def refuse(name: str, bad: NDArray[np.bool_], values: NDArray[Any], expected: str) -> None:
    """Raise for the first row where ``bad`` (shape ``(n_rows,)``) holds.

    Raises:
        InvalidObservation: There is such a row.
    """
    if bad.any():
        row = int(np.argmax(bad))
        raise InvalidObservation(f"{name} (row {row})", values[row].item(), expected)


def _raw(name: str, values: object) -> NDArray[Any]:
    try:
        raw = np.asarray(values)
        if raw.dtype.kind in "US" and not isinstance(values, np.ndarray):
            raw = np.asarray(values, dtype=object)  # numpy turns [1, "a"] into texts; the cells are wanted as they came
    except (TypeError, ValueError) as error:
        raise InvalidObservation(name, values, f"a column of single values ({error})") from None
    if raw.ndim != 1:
        raise InvalidObservation(name, values, "a column of single values; is its name twice in the table?")
    return raw


def _empty(cell: object) -> bool:
    if cell is None or type(cell).__name__ in ("NAType", "NaTType"):
        return True
    return (isinstance(cell, float) and math.isnan(cell)) or (isinstance(cell, str) and not cell.strip())


def _number(name: str, row: int, cell: object, instants: bool) -> float:
    if _empty(cell):
        return math.nan
    try:
        if not isinstance(cell, bool) and isinstance(cell, (str, Real)):
            return float(cell)
        if instants and isinstance(cell, datetime):
            return cell.timestamp()
    except (ValueError, OverflowError):
        pass
    raise InvalidObservation(f"{name} (row {row})", cell, "a number")

"""What commands print: JSON for programs on standard output, tables for people, progress on standard error."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_NUMBER = re.compile(r"[$–<>+−-]? ?[\d.,]*( ?(ms|s|%|m \d+ s))?")


def print_json(document: object) -> None:
    """One JSON document; what is not a finite number becomes ``null``."""
    print(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(rows: Sequence[Mapping[str, object]], *, title: str = "") -> None:
    """Rows with the same keys; numbers are set to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        table.add_column(name, justify="left" if any(_is_word(value) for value in values) else "right")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row.values()))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    console.print(table)


def print_line(text: str) -> None:
    """One line or paragraph of plain text."""
    print(text)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on standard error while the body runs; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} …"):
        yield


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; the body calls what it gets with steps done and steps in all."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _is_word(value: object) -> bool:
    return not isinstance(value, (int, float)) and _NUMBER.fullmatch(str(value)) is None

"""Progress of something that takes minutes: a bar per phase on a terminal, a line per phase elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Heard = Callable[[str, int, int, str], None]


@contextmanager
def steps() -> Iterator[Heard]:
    """Gives a function ``(phase, done, of, detail)`` that shows where things stand, on standard error."""
    if not sys.stderr.isatty():
        yield _line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        phases: dict[str, object] = {}

        def show(phase: str, done: int, of: int, detail: str) -> None:
            if phase not in phases:
                for earlier in phases.values():
                    bars.stop_task(earlier)  # type: ignore[arg-type]
                phases[phase] = bars.add_task(phase, total=of, detail=detail)
            bars.update(phases[phase], completed=done, total=of, detail=detail)  # type: ignore[arg-type]

        yield show


def _line(phase: str, done: int, of: int, detail: str) -> None:
    print(f"{phase}: {done} of {of}{f', {detail}' if detail else ''}", file=sys.stderr, flush=True)

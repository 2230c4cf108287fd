"""Numbers as people read them."""

from __future__ import annotations

import math

from prefect_slo.resources import Option, Size


def seconds_text(value: float) -> str:
    """Three significant digits with a unit: ``"84 ms"``, ``"5.21 s"``, ``"2 m 5 s"``; a dash for ``nan``."""
    if math.isnan(value):
        return "–"
    if value < 0.9995:
        return f"{1000 * value:.3g} ms"
    if value < 119.5:
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} m {seconds} s"


def dollars_text(value: float) -> str:
    """Three significant digits, never in powers of ten: ``"$0.000213"``; a dash for ``nan``."""
    if math.isnan(value):
        return "–"
    if value == 0:
        return "$0"
    decimals = max(2, 2 - math.floor(math.log10(abs(value))))
    return f"${value:.{decimals}f}"


def share_text(value: float) -> str:
    """A fraction as a percentage with at most one decimal, never rounded up to 100: ``"94.5 %"``, ``"> 99.9 %"``."""
    if math.isnan(value):
        return "–"
    if 0.9995 <= value < 1:
        return "> 99.9 %"
    if 0 < value < 0.0005:
        return "< 0.1 %"
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def size_text(size: Size) -> str:
    """A worker's size: ``"0.579 vCPU, 1024 MB"``."""
    gpu = f", {size.gpu:g} {size.hardware}" if size.gpu else ""
    return f"{size.vcpus:.3g} vCPU, {size.memory_mb} MB{gpu}"


def option_text(option: Option) -> str:
    """What was chosen for a stage: ``"4 × 1 vCPU, 1024 MB"``, with the batch where calls take more than one item."""
    batch = f", batch {option.batch}" if option.batch > 1 else ""
    return f"{option.workers} × {size_text(option.size)}{batch}"


def cell_text(text: str) -> str:
    """Any text so that it stays inside a line or a table cell of Markdown."""
    return "".join(f"\\{c}" if c in "\\|*_`<>[]#" else c for c in text).replace("\n", " ")

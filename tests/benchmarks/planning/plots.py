"""Line plots as SVG text: a few panels with logarithmic axes, no library needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT, EDGE = 330, 230, 46
COLOURS = ("#d62728", "#1f77b4", "#17becf", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#aaaaaa")


@dataclass(frozen=True)
class Line:
    """A line of points; ``bold`` makes it stand out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    bold: bool = False


def panels(title: str, drawn: Sequence[tuple[str, str, Sequence[Line]]], columns: int = 3) -> str:
    """An SVG document: ``(label of x, label of y, lines)`` for each panel, with one legend."""
    rows = -(-len(drawn) // columns)
    names = [line.name for line in drawn[0][2]] if drawn else []
    legend = 18 * (1 + len(names) // 4) + 10
    height = rows * (HEIGHT + 10) + legend + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{columns * WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="16" font-size="14">{escape(title)}</text>',
    ]
    for at, (x_label, y_label, lines) in enumerate(drawn):
        left, top = (at % columns) * WIDTH, 24 + (at // columns) * (HEIGHT + 10)
        parts += _panel(left, top, x_label, y_label, lines)
    for at, name in enumerate(names):
        x, y = 10 + (at % 4) * 200, height - legend + 14 + 18 * (at // 4)
        parts.append(
            f'<line x1="{x}" y1="{y - 4}" x2="{x + 22}" y2="{y - 4}" stroke="{_colour(at)}" stroke-width="2"/>'
        )
        parts.append(f'<text x="{x + 28}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: int, top: int, x_label: str, y_label: str, lines: Sequence[Line]) -> list[str]:
    xs, ys = (np.array([v for line in lines for v in getattr(line, axis)]) for axis in "xy")
    if not xs.size:
        return []
    x_at, y_at = _scale(xs, left + EDGE, left + WIDTH - 12), _scale(ys, top + HEIGHT - EDGE, top + 10)
    base, side = top + HEIGHT - EDGE, left + EDGE
    parts = [
        f'<path d="M{side} {top + 10}V{base}H{left + WIDTH - 12}" fill="none" stroke="#444"/>',
        f'<text x="{left + WIDTH // 2}" y="{base + 34}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="{left + 10}" y="{top + HEIGHT // 2}" text-anchor="middle" '
        f'transform="rotate(-90 {left + 10} {top + HEIGHT // 2})">{escape(y_label)}</text>',
    ]
    for value in _ticks(xs):
        parts.append(f'<text x="{x_at(value):.1f}" y="{base + 16}" text-anchor="middle">{value:.3g}</text>')
    for value in _ticks(ys):
        parts.append(f'<text x="{side - 4}" y="{y_at(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for at, line in reversed(list(enumerate(lines))):
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        width = 2.5 if line.bold else 1.2
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(at)}" stroke-width="{width}"/>')
    return parts


def _scale(values: np.ndarray, low: float, high: float) -> Callable[[float], float]:
    first, last = np.log(values.min()), np.log(values.max())
    span = max(last - first, 1e-9)
    return lambda value: low + (np.log(value) - first) / span * (high - low)


def _ticks(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.geomspace(values.min(), values.max(), 4)]


def _colour(at: int) -> str:
    return COLOURS[at % len(COLOURS)]

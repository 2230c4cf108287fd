"""Small charts as SVG, which both generations of the Prefect UI show where a Markdown image holds them."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 720.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 150.0, 16.0, 28.0
_MET, _MISSED, _INK = "#2b88d0", "#e06c10", "#808a94"  # told apart by colour-blind readers; ink reads on dark and light
_MOST = 60


def runs_chart(
    values: Sequence[float],
    *,
    bound: float,
    predicted: float = math.nan,
    predicted_name: str = "predicted",
    text: Callable[[float], str] = str,
) -> str:
    """One dot per run, the last 60 of them, with the bound and the prediction as lines.

    Args:
        values: Latency or cost of runs, oldest first; at least one.
        bound: What was promised; runs above it are orange and square.
        predicted: What the plan predicted at the percentile; ``nan`` draws no line.
        predicted_name: Label of that line.
        text: Writes a value on the axis.
    """
    shown = list(values)[-_MOST:]
    top = 1.12 * max([bound, *(v for v in (*shown, predicted) if math.isfinite(v))])
    step = (_WIDTH - _LEFT - _RIGHT) / len(shown)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value / top)

    marks = [
        _mark(_LEFT + (i + 0.5) * step, y(value), missed=value > bound)
        for i, value in enumerate(shown)
        if math.isfinite(value)
    ]
    lines = [_line(y(0), _INK, "0", ""), _line(y(bound), _MISSED, text(bound), "bound", dashes="7 4")]
    if math.isfinite(predicted):
        apart = abs(y(predicted) - y(bound)) >= 14
        lines.append(_line(y(predicted), _MET, text(predicted) if apart else "", predicted_name, dashes="2 4",
                           lower=0.0 if apart else 14.0))  # fmt: skip
    first = len(values) - len(shown) + 1
    ends = [_text(_LEFT, _HEIGHT - 8, f"run {first}", _INK, "start")]
    if len(shown) > 1:
        ends.append(_text(_WIDTH - _RIGHT, _HEIGHT - 8, f"run {len(values)}", _INK, "end"))
    body = "".join([*lines, *marks, *ends])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" width="{_WIDTH:g}" '
        f'height="{_HEIGHT:g}" font-family="system-ui, sans-serif" font-size="12">{body}</svg>'
    )


def data_uri(svg: str) -> str:
    """An SVG as the target of a Markdown image."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _mark(x: float, y: float, *, missed: bool) -> str:
    if missed:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{_MISSED}"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_MET}"/>'


def _line(y: float, colour: str, left: str, right: str, *, dashes: str = "", lower: float = 0.0) -> str:
    stroke = f' stroke-dasharray="{dashes}"' if dashes else ""
    line = f'<line x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"{stroke}/>'
    labels = _text(_LEFT - 8, y + 4, left, _INK, "end") + _text(
        _WIDTH - _RIGHT + 8, y + 4 + lower, right, colour, "start"
    )
    return line + labels


def _text(x: float, y: float, text: str, colour: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>' if text else ""

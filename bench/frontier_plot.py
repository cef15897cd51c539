"""A picture of score against bytes as SVG, of one task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 32, 40, 50
COLOURS = {"howfine": "#0b6e99", "peft": "#c2410c"}
NAMES = {"howfine": "howfine", "peft": "PEFT"}


class Point(NamedTuple):
    """One entry."""

    name: str
    side: str
    bytes: float
    share: float
    named: bool  # whether the name stands beside it, not only in the tooltip


def picture(title: str, points: Sequence[Point], kept: float) -> str:
    """Share of full fine-tuning's score against bytes (log axis); a line where enough is kept."""
    low, high = _decades([point.bytes for point in points])
    bottom, top = _span([point.share for point in points], kept)

    def x(size: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(size) - low) / (high - low)

    def y(share: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (top - share) / (top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 20, title, "start", 'font-weight="bold"'),
    ]
    for decade in range(low, high + 1):
        at = x(10**decade)
        parts.append(_line(at, TOP, at, HEIGHT - BOTTOM, "#ddd"))
        parts.append(_text(at, HEIGHT - BOTTOM + 18, _size(decade), "middle"))
    step = _step(top - bottom)
    for number in range(math.ceil(bottom / step), math.floor(top / step) + 1):
        at = y(number * step)
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "#ddd"))
        parts.append(_text(LEFT - 8, at + 4, f"{100 * number * step:.0f} %", "end"))
    parts.append(_line(LEFT, y(kept), WIDTH - RIGHT, y(kept), "#222", 'stroke-dasharray="5 4"'))
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 10, "bytes of the file", "middle"))
    parts += [_mark(x(p.bytes), y(p.share), p) for p in points]
    for number, side in enumerate(COLOURS):
        at = WIDTH - RIGHT - 160 + 80 * number
        parts += [_shape(at, 16, side), _text(at + 10, 20, NAMES[side], "start")]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _mark(x: float, y: float, point: Point) -> str:
    about = f"{point.name}: {point.bytes:,.0f} bytes, {100 * point.share:.1f} % of full"
    side = (8, "start") if x < WIDTH - 160 else (-8, "end")
    name = _text(x + side[0], y - 6, point.name, side[1]) if point.named else ""
    return f"<g><title>{escape(about)}</title>{_shape(x, y, point.side)}{name}</g>"


def _shape(x: float, y: float, side: str) -> str:
    """A disc for howfine, a square for PEFT: they differ without colour, too."""
    look = f'fill="{COLOURS[side]}" fill-opacity="0.75"'
    if side == "howfine":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {look}/>'
    return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" {look}/>'


def _text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place} {more}>{escape(words)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" {more}/>'


def _decades(sizes: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes)))
    return low, max(high, low + 1)


def _span(shares: Sequence[float], kept: float) -> tuple[float, float]:
    low, high = min([*shares, kept]), max([*shares, 1.0])
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def _step(span: float) -> float:
    """Between grid lines: six of them at most."""
    return next((step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if span / step <= 6), 1.0)


def _size(decade: int) -> str:
    unit = "kB" if decade < 6 else "MB"
    return f"{10**decade} B" if decade < 3 else f"{10 ** (decade % 3)} {unit}"

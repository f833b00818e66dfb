"""Curves as inline SVG that fits any screen.

What belongs here: pure functions from series of points to a piece of HTML. Imports the standard library only.

Design: the drawing is stretched to its box (0..1000 both ways) and strokes are not, so one picture serves phone,
desktop and paper; the words on the axes are HTML over it and keep their size. At most 1,000 points are drawn
a series, the lowest and highest of each stretch among them, so that no spike is lost.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float | None]
"""(x, y) in the units of the axes; y is None (or not finite) where there is no value, which breaks the line."""

Words = Callable[[float], str]
"""How a value is written."""

BOX = 1000
READINGS = 250
"""Places at which the pointer finds a value."""


@dataclass(frozen=True)
class Series:
    """One curve; ``style`` names its CSS class: 'raw', 'train', 'held' ..."""

    name: str
    points: Sequence[Point]
    style: str
    dots: bool = False
    """Also mark every point (for few of them)."""


@dataclass(frozen=True)
class Axis:
    """Range, and how a value is written."""

    low: float
    high: float
    words: Words

    def place(self, value: float) -> float:
        """0 at ``low``, BOX at ``high``."""
        return BOX * (value - self.low) / (self.high - self.low)


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x_name: str,
    x_words: Words,
    y_words: Words,
    from_zero: bool = False,
    best: tuple[float, float] | None = None,
) -> str:
    """``series`` over a common x axis from 0; ``best`` marks one point. The first series' points answer the pointer."""
    series = [s for s in (Series(s.name, thin(finite(s.points)), s.style, s.dots) for s in series) if _values(s)]
    if not series:
        return f'<figure class="chart"><p class="empty">{escape(title)}: nothing recorded yet.</p></figure>'
    x = Axis(0.0, max(p[0] for s in series for p in s.points) or 1.0, x_words)
    y = Axis(*value_range([v for s in series for v in _values(s)], from_zero), y_words)
    y_ticks, x_ticks = nice_ticks(y.low, y.high, 5), nice_ticks(x.low, x.high, 5)
    grid = "".join(f"M0 {BOX - y.place(t):.1f}H{BOX}" for t in y_ticks)
    marks = [f'<path class="grid" d="{grid}"/>']
    marks += [f'<path class="{s.style}" d="{_line(s.points, x, y)}"/>' for s in series]
    marks += [f'<path class="dot {s.style}" d="{_dots(s.points, x, y)}"/>' for s in series if s.dots]
    if best is not None:
        marks.append(f'<path class="dot best" d="{_dots([best], x, y)}"/>')
    labels = [f'<span class="y" style="top:{100 - y.place(t) / 10:.2f}%">{escape(y_words(t))}</span>' for t in y_ticks]
    labels += [f'<span class="x" style="left:{x.place(t) / 10:.2f}%">{escape(x_words(t))}</span>' for t in x_ticks]
    legend = "".join(f'<span class="key {s.style}">{escape(s.name)}</span>' for s in series)
    readings = escape(json.dumps(_readings(series, x, x_name, y_words)))
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> {legend if len(series) > 1 else ""}'
        f'</figcaption><div class="plot" data-read="{readings}">'
        f'<svg viewBox="0 0 {BOX} {BOX}" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f'{"".join(marks)}</svg>{"".join(labels)}<i class="cursor" hidden></i><output></output></div></figure>'
    )


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten inside [low, high], about ``about`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.9999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def thin(points: Sequence[Point], limit: int = 1000) -> list[Point]:
    """At most ``limit`` points: lowest and highest of each of ``limit / 2`` stretches, in order."""
    if len(points) <= limit:
        return list(points)
    n, kept = limit // 2, []
    for i in range(n):
        stretch = points[i * len(points) // n : (i + 1) * len(points) // n]
        known = [j for j, (_, v) in enumerate(stretch) if v is not None] or [0]
        ends = {min(known, key=lambda j: stretch[j][1] or 0.0), max(known, key=lambda j: stretch[j][1] or 0.0)}
        kept += [stretch[j] for j in sorted(ends)]
    return kept


def centred_means(values: Sequence[float | None], reach: int) -> list[float | None]:
    """Mean of the finite values up to ``reach`` places either side, fewer near the ends: smooth without lagging."""
    means: list[float | None] = []
    for i in range(len(values)):
        r = min(reach, i, len(values) - 1 - i)
        near = [v for v in values[i - r : i + r + 1] if v is not None]
        means.append(sum(near) / len(near) if near and values[i] is not None else None)
    return means


def finite(points: Sequence[Point]) -> list[Point]:
    """``points`` with None for what is no number."""
    return [(x, v if v is not None and math.isfinite(v) else None) for x, v in points]


def value_range(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    """Range of the y axis. A few outliers (first steps, a spike) leave the picture rather than flatten it."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[int(0.95 * (len(ordered) - 1))]
    base = 0.0 if from_zero else low
    if high - base > 2.5 * (usual - base) > 0:
        high = base + 1.25 * (usual - base)
    margin = 0.05 * (high - base) or 0.05 * abs(high) or 1.0
    return (0.0 if from_zero and low >= 0 else low - margin), high + margin


def _values(series: Series) -> list[float]:
    return [v for _, v in series.points if v is not None]


def _line(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """SVG path; a missing value lifts the pen."""
    pieces, pen = [], "M"
    for at, value in points:
        if value is None:
            pen = "M"
            continue
        pieces.append(f"{pen}{x.place(at):.1f} {BOX - y.place(value):.1f}")
        pen = "L"
    return "".join(pieces)


def _dots(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Strokes of no length: with round ends they are circles however the box is stretched."""
    return "".join(f"M{x.place(at):.1f} {BOX - y.place(v):.1f}h0" for at, v in points if v is not None)


def _readings(series: Sequence[Series], x: Axis, x_name: str, y_words: Words) -> list[tuple[float, str]]:
    """(place along x, words): each series' latest value at or before that place."""
    known = [(s.name, [p for p in s.points if p[1] is not None]) for s in series]
    first = known[0][1]
    rows = []
    for i in sorted({j * (len(first) - 1) // READINGS for j in range(READINGS + 1)}):
        at = first[i][0]
        words = [f"{x_name} {x.words(at)}"]
        for name, points in known:
            k = bisect_right(points, at, key=lambda p: p[0])
            if k:
                value = y_words(float(f"{points[k - 1][1]:.4g}"))
                words.append(f"{name} {value}" if len(known) > 1 else value)
        rows.append((round(x.place(at), 1), " · ".join(words)))
    return rows

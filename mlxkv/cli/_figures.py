"""Figures as text: SVG for a page that needs no other file, drawn in the page's own colours, light or dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

from mlxkv.cli._output import format_value

WIDEST_SPAN = 20  # largest over smallest, from which on an axis is logarithmic
MOST_DOTS = 120  # of one row of a strip
LETTER = 7.0  # pixels that a letter of a label takes
_SHAPES = ("M-4.5,0a4.5,4.5 0 1 0 9,0a4.5,4.5 0 1 0 -9,0", "M-4,-4h8v8h-8z", "M0,-5.2L5,4.2H-5z", "M0,-5.5L5.5,0L0,5.5L-5.5,0z",
           "M0,5.2L5,-4.2H-5z", "M-5,-1.8h3.2v-3.2h3.6v3.2h3.2v3.6h-3.2v3.2h-3.6v-3.2h-3.2z")  # fmt: skip
COLORS = 7  # that the page's style has, beside the untouched cache's
_SHARES = (  # of which an axis shows the first that have room
    (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3),
    (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 2, 3),
    (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
    (0.001, 0.01, 0.1, 1, 10),
)
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Point(NamedTuple):
    """A variant's mean, with its interval where there is one."""

    name: str
    look: int  # its colour and shape
    share: float  # of float16's bytes
    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Scale:
    """From numbers to pixels; on a logarithmic one what is not above 0 is at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        """Return the place of a number, at the edge where it lies beyond."""
        numbers = self.low, self.high, min(max(value, self.low), self.high)
        low, high, x = map(math.log, numbers) if self.log else numbers
        return self.start + (x - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round numbers within the scale, a few."""
        if not self.log:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
            step *= next(by for by in (1, 2, 5, 10, 20) if by * step * most >= self.high - self.low)
            return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [by * 10.0**power for power in range(first, last + 1) for by in digits]
            found = [number for number in found if self.low <= number <= self.high]
            if len(found) <= most:
                break
        return found[:: math.ceil(len(found) / most)] if found else [self.low, self.high]


def scale_of(values: Iterable[float], start: float, end: float) -> Scale:
    """Return a scale with room for all values: logarithmic where they are many times as large as each other."""
    numbers = [value for value in values if math.isfinite(value)] or [0.0]
    above = [value for value in numbers if value > 0]
    if above and min(numbers) >= 0 and max(above) > WIDEST_SPAN * min(above):
        return Scale(min(above) / 2, max(above) * 1.6, start, end, log=True)
    low, high = min(numbers), max(numbers)
    pad = 0.08 * (high - low) or abs(high) / 10 or 1.0
    return Scale(0.0 if low == 0 else low - pad, high + pad, start, end, log=False)


def color(look: int) -> str:
    """Return the class of a variant's colour; the first one is the untouched cache."""
    return f"c{(look - 1) % COLORS + 1 if look else 0}"


def mark(look: int, x: float, y: float, title: str) -> str:
    """Return the marker of a variant."""
    shape = _SHAPES[look % len(_SHAPES)]
    return f'<path class="mark {color(look)}" d="{shape}" transform="translate({x:.1f},{y:.1f})"><title>{plain(title)}</title></path>'


def scatter(score: str, points: Sequence[Point], width: int, height: int, all_named: bool = True) -> str:
    """Return a figure of a score against bytes; the first point is the untouched cache, shown as a line.

    Where not all have to be named, those without room for a label have none.
    """
    whole, others = points[0], points[1:] or points
    ends = [bound for point in others for bound in (point.value, *(point.interval or ()))]
    y = scale_of([*ends, whole.value], height - 52, 14)
    shares = [point.share for point in others]
    x = Scale(min(shares) / 1.35, max(shares) * 1.35, 66, width - 16, log=True)
    bottom = y.start
    parts = [_x_of_bytes(x, bottom), _y_axis(y, x, score)]
    at_floor = y.log and whole.value <= 0
    text = f"{whole.name}: {format_value(score, whole.value)}" + (", at the lower edge" if at_floor else "")
    line = bottom if at_floor else y(whole.value)
    parts.append(f'<path class="whole" d="M{x.start},{line:.1f}H{x.end}"/>')
    taken: list[Box] = [(x.end - LETTER * len(text), line - 16, x.end, line), (x.start, line - 1, x.end, line + 1)]
    parts.append(f'<text class="note" x="{x.end}" y="{line - 5:.1f}" text-anchor="end">{plain(text)}</text>')
    places = [(point, x(point.share), y(point.value)) for point in others]
    for point, left, top in places:
        taken.append((left - 6, top - 6, left + 6, top + 6))
        if point.interval:
            low, high = (y(bound) for bound in point.interval)
            parts.append(f'<path class="bar {color(point.look)}" d="M{left:.1f},{low:.1f}V{high:.1f}"/>')
            taken.append((left - 1, high, left + 1, low))
    for point, left, top in sorted(places, key=lambda place: place[1]):
        parts.append(mark(point.look, left, top, _told(score, point)))
        parts.append(_label(shortened(point.name), left, top, taken, (x.start, 4, width - 4, bottom), all_named))
    what = f"{score} against bytes: {', '.join(point.name for point in points)}"
    return _svg(width, height, what, parts)


def strips(score: str, rows: Mapping[str, Sequence[float]], means: Sequence[Point], facts: Sequence[str]) -> str:
    """Return a figure of all samples of a score, one row for each variant, with means and their intervals."""
    width, left, row_height = 480, 112, 26
    height = 14 + row_height * len(rows) + 34
    x = scale_of((value for values in rows.values() for value in values), left, width - 16)
    bottom = height - 34
    parts = [_x_axis(x, bottom, score)]
    for number, ((name, values), mean) in enumerate(zip(rows.items(), means)):
        y = 14 + row_height * (number + 0.5)
        parts.append(
            f'<text class="label" x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{plain(shortened(name, 14))}</text>'
        )
        step = math.ceil(len(values) / MOST_DOTS)
        for i in range(0, len(values), step):
            told = plain(f"{name}: {format_value(score, values[i])}{f' ({facts[i]})' if facts[i] else ''}")
            up = y + (i * 0.618 % 1 - 0.5) * 13  # apart, so that equal ones are seen
            parts.append(
                f'<circle class="dot {color(mean.look)}" cx="{x(values[i]):.1f}" cy="{up:.1f}" r="3"><title>{told}</title></circle>'
            )
        if mean.interval:
            low, high = (x(bound) for bound in mean.interval)
            parts.append(f'<path class="bar {color(mean.look)}" d="M{low:.1f},{y:.1f}H{high:.1f}"/>')
        parts.append(
            f'<path class="mean" d="M{x(mean.value):.1f},{y - 10:.1f}v20"><title>{plain(_told(score, mean))}</title></path>'
        )
    return _svg(width, height, f"samples of {score}: {', '.join(rows)}", parts)


def grids(score: str, cells: Mapping[tuple[str, str], float], ends: tuple[float, float]) -> Iterator[str]:
    """Yield figures of numbers by row and column, the darker the larger; `ends` are the smallest and largest of all."""
    rows = list(dict.fromkeys(row for row, _ in cells))
    every = list(dict.fromkeys(column for _, column in cells))
    left = 16 + max(LETTER * min(24, len(row)) for row in rows)
    cell = max(58, *(LETTER * min(18, len(column)) + 4 for column in every))
    per = max(1, int((900 - left) / cell))  # columns that a page has room for
    for columns in (every[i : i + per] for i in range(0, len(every), per)):
        parts = [
            f'<text class="tick" x="{left + cell * (j + 0.5):.1f}" y="20" text-anchor="middle">{plain(shortened(name, 18))}</text>'
            for j, name in enumerate(columns)
        ]
        for i, row in enumerate(rows):
            y = 30 + 28 * i
            parts.append(
                f'<text class="label" x="{left - 8:.1f}" y="{y + 18}" text-anchor="end">{plain(shortened(row, 24))}</text>'
            )
            for j, column in enumerate(columns):
                if (value := cells.get((row, column))) is not None:
                    depth = (value - ends[0]) / (ends[1] - ends[0]) if ends[1] > ends[0] else 0.0
                    parts.append(
                        _cell(left + cell * j + 1, y, cell - 2, depth, format_value(score, float(f"{value:.3g}")))
                    )
        what = f"{score} of {', '.join(rows)} by {', '.join(columns)}"
        yield _svg(math.ceil(left + cell * len(columns) + 8), 30 + 28 * len(rows), what, parts, natural=True)


def _cell(x: float, y: float, width: float, depth: float, text: str) -> str:
    return (
        f'<rect class="cell" x="{x:.1f}" y="{y}" width="{width:.1f}" height="26" fill-opacity="{0.06 + 0.6 * depth:.2f}"/>'
        f'<text class="value" x="{x + width / 2:.1f}" y="{y + 18}" text-anchor="middle">{plain(text)}</text>'
    )


def plain(text: str) -> str:
    """Return text escaped for HTML and SVG, without control characters and halves of characters."""
    whole = text.encode("utf-8", "replace").decode()
    return escape("".join(char if char.isprintable() or char == "\n" else "?" for char in whole))


def shortened(name: str, most: int = 26) -> str:
    """Return a name of at most so many letters; of a long one, such as a path, the end says more."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _told(score: str, point: Point) -> str:
    """Return what a pointer over a mean says."""
    bounds = point.interval and " to ".join(format_value(score, bound) for bound in point.interval)
    return f"{point.name}: {format_value(score, point.value)}{f' ({bounds})' if bounds else ''}, {100 * point.share:.3g} % of float16's bytes"


def _label(text: str, x: float, y: float, taken: list[Box], room: Box, always: bool) -> str:
    """Return a label beside a point, where it covers least of what is there, and note its place."""
    wide = LETTER * len(text)
    tried: list[tuple[float, int, float, float, str, Box]] = []
    for out in (0, 10, 22):
        for side, up in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
            at, middle = x + side * (9 + out), y + up * (14 + out)
            left = at - (wide, wide / 2, 0)[side + 1]
            box = left, middle - 7, left + wide, middle + 7
            outside = box[0] < room[0] or box[1] < room[1] or box[2] > room[2] or box[3] > room[3]
            covered = sum(_overlap(box, other) for other in taken) + 1e4 * outside
            tried.append((covered, len(tried), at, middle, ("end", "middle", "start")[side + 1], box))
    covered, _, at, middle, anchor, box = min(tried)
    if covered and not always:
        return ""
    taken.append(box)
    return f'<text class="label" x="{at:.1f}" y="{middle + 4:.1f}" text-anchor="{anchor}">{plain(text)}</text>'


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _x_of_bytes(x: Scale, bottom: float) -> str:
    """Return the axis of bytes: shares of float16's, and how many times smaller that is."""
    for numbers in _SHARES:
        shares = [share for share in numbers if x.low <= share <= x.high]
        if all(x(after) - x(before) >= 44 for before, after in pairwise(shares)):
            break
    parts = []
    for share in shares:
        place = f'x="{x(share):.1f}" text-anchor="middle"'
        parts.append(
            f'<path class="grid" d="M{x(share):.1f},14V{bottom}"/><text class="tick" {place} y="{bottom + 16}">{100 * share:g} %</text>'
        )
        parts.append(f'<text class="tick faint" {place} y="{bottom + 30}">{1 / share:.3g}x</text>')
    middle = (x.start + x.end) / 2
    parts.append(
        f'<text class="axis" x="{middle:.1f}" y="{bottom + 47}" text-anchor="middle">share of the bytes in float16 (times smaller)</text>'
    )
    return "".join(parts)


def _y_axis(y: Scale, x: Scale, score: str) -> str:
    parts = []
    for tick, text in _ticks(y, score):
        parts.append(f'<path class="grid" d="M{x.start},{y(tick):.1f}H{x.end}"/>')
        parts.append(
            f'<text class="tick" x="{x.start - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{plain(text)}</text>'
        )
    return "".join(parts)


def _x_axis(x: Scale, bottom: float, score: str) -> str:
    parts = []
    for tick, text in _ticks(x, score):
        parts.append(f'<path class="grid" d="M{x(tick):.1f},8V{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{plain(text)}</text>'
        )
    return "".join(parts)


def _ticks(scale: Scale, score: str) -> list[tuple[float, str]]:
    """Return the ticks of a scale with their text, of as many digits as tell them apart."""
    ticks = scale.ticks()
    texts = [format_value(score, tick) for tick in ticks]
    if len(set(texts)) < len(texts):
        texts = [f"{tick:.8g}" for tick in ticks]
    return list(zip(ticks, texts))


def _svg(width: int, height: float, what: str, parts: Iterable[Any], natural: bool = False) -> str:
    """Return a figure; a natural one is as wide as it is, others as the page."""
    size = f' width="{width}"' if natural else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}"{size} role="img" aria-label="{plain(what)}">'
        f"{''.join(parts)}</svg>"
    )

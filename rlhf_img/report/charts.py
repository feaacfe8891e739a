"""Line charts as inline SVG: they take their colours from the page, so they follow its light and dark."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 320, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 22


class Line(NamedTuple):
    """One run's values: y is None where there is nothing to draw."""

    label: str
    color: int
    """Index of the run, which picks the colour."""
    x: Sequence[float]
    y: Sequence[float | None]


def line_chart(title: str, lines: Sequence[Line], band: tuple[float, float] | None = None) -> Markup:
    """The raw values faint and their running mean over a tenth of the run strong. Gaps stay gaps.

    `band`: where shares should be; it is shaded, and the chart goes from 0 to 1.
    """
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y if y is not None]
    if not xs or not ys:
        return Markup('<p class="quiet">no values</p>')
    x_low, x_high = min(xs), max(xs)
    ticks = nice_ticks(min(ys), max(ys)) if band is None else [0.0, 0.5, 1.0]
    y_low, y_high = min(ticks[0], min(ys)), max(ticks[-1], max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [] if band is None else [_shaded(at(x_high, band[1])[1], at(x_low, band[0])[1])]
    parts += [_y_axis(at(x_low, tick)[1], tick, ticks) for tick in ticks]
    parts += [
        Markup('<text class="tick" x="{}" y="{}">step {:g}</text>').format(_LEFT, HEIGHT - 6, x_low),
        Markup('<text class="tick end" x="{}" y="{}">{:g}</text>').format(WIDTH - _RIGHT, HEIGHT - 6, x_high),
    ]
    for line in lines:
        window = max(1, len(line.x) // 10)
        smooth = running_mean(line.y, window)
        parts.append(_path(line, line.y, at, "raw"))
        parts.append(_path(line, smooth, at, "mean"))
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, escape(title), Markup("").join(parts)
    )


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """The mean of the last `window` values that are there; None where the value itself is missing.

    >>> running_mean([1.0, 3.0, None, 5.0], 2)
    [1.0, 2.0, None, 5.0]
    """
    result: list[float | None] = []
    for i, value in enumerate(values):
        there = [v for v in values[max(0, i - window + 1) : i + 1] if v is not None]
        result.append(None if value is None else sum(there) / len(there))
    return result


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that span [low, high].

    >>> nice_ticks(0.12, 0.37)
    [0.1, 0.2, 0.3, 0.4]
    """
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number in at most five signs or so, for an axis or a table.

    >>> [short(v) for v in (0, 0.25, 12.0, 1234.5, 0.00002)]
    ['0', '0.25', '12', '1234', '2e-05']
    """
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{exponent}"
    return f"{value:.4g}"


def _y_axis(y: float, tick: float, ticks: Sequence[float]) -> Markup:
    kind = "grid zero" if tick == 0 and min(ticks) < 0 else "grid"
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
        kind, _LEFT, WIDTH - _RIGHT, y, y
    ) + Markup('<text class="tick end" x="{}" y="{:.1f}">{}</text>').format(_LEFT - 6, y + 3.5, short(tick))


def _shaded(top: float, bottom: float) -> Markup:
    return Markup('<rect class="band" x="{}" y="{:.1f}" width="{}" height="{:.1f}"/>').format(
        _LEFT, top, WIDTH - _LEFT - _RIGHT, bottom - top
    )


def _path(line: Line, values: Sequence[float | None], at: object, kind: str) -> Markup:
    assert callable(at)
    segments: list[list[str]] = [[]]
    for x, y in zip(line.x, values, strict=True):
        if y is None:
            segments.append([])
        else:
            px, py = at(x, y)
            segments[-1].append(f"{px:.1f} {py:.1f}")
    # A lone point is drawn as a line to itself, which a round cap shows as a dot.
    data = " ".join("M" + " L".join(s if len(s) > 1 else s * 2) for s in segments if s)
    return Markup('<path class="{} run{}" d="{}"><title>{}</title></path>').format(kind, line.color, data, line.label)

"""A loss curve as inline SVG: no script, readable in both colour schemes,
a title on every point.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

WIDTH, HEIGHT = 720, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 34, 46
MAX_POINTS, MAX_FLAGS = 140, 40


@dataclass(frozen=True)
class Curve:
    """A named series of (step, value); `marker` is `line` or `dot`;
    `stderr` maps steps to standard errors, drawn as bars.
    """

    name: str
    points: Sequence[tuple[float, float]]
    unit: str
    marker: str = "line"
    stderr: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Flag:
    """Something that happened at a step: one letter on the chart, the sentence on hover."""

    step: float
    letter: str
    text: str


@dataclass(frozen=True)
class _Scale:
    """Maps a value range onto pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values inside the range."""
        raw = (self.high - self.low) / wanted
        power = 10 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def thin(points: Sequence, limit: int) -> list:
    """At most `limit` items, evenly spaced, first and last kept."""
    if len(points) <= limit:
        return list(points)
    return [points[round(i * (len(points) - 1) / (limit - 1))] for i in range(limit)]


def loss_chart(
    title: str, curves: Sequence[Curve], flags: Sequence[Flag] = (), *, x_label: str, y_label: str
) -> str:
    """The figure as HTML without blank lines, or an empty string if no curve has a finite point."""
    finite = [replace(c, points=[p for p in c.points if math.isfinite(p[1])]) for c in curves]
    drawn = [c for c in finite if c.points]
    if not drawn:
        return ""
    xs = [x for c in drawn for x, _ in c.points] + [f.step for f in flags]
    ys = [y for c in drawn for _, y in c.points]
    x, y = (
        _Scale(*_range(xs, 0), LEFT, WIDTH - RIGHT),
        _Scale(*_range(ys, 0.05), HEIGHT - BOTTOM, TOP),
    )
    parts = [
        '<figure class="chart">',
        (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}" '
            'xmlns="http://www.w3.org/2000/svg">'
        ),
        f"<title>{html.escape(title)}</title>",
        *_axes(x, y, x_label, y_label),
        *_flags(x, flags),
        *(line for i, c in enumerate(drawn) for line in _curve(x, y, c, i)),
        *_legend(drawn),
        "</svg>",
        f"<figcaption>{html.escape(_caption(drawn, flags))}</figcaption>",
        "</figure>",
    ]
    return "\n".join(parts)


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - 0.5, high + 0.5
    return low - margin * (high - low), high + margin * (high - low)


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str) -> list[str]:
    base = HEIGHT - BOTTOM
    parts = ['<g class="chart-axis">']
    for value in y.ticks():
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    parts += [
        f'<text x="{x(v):.1f}" y="{base + 17}" text-anchor="middle">{v:g}</text>'
        for v in x.ticks(7)
    ]
    parts.append(
        f'<line class="chart-base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>'
    )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{html.escape(x_label)}</text>'
    )
    middle = (TOP + base) / 2
    parts.append(
        f'<text x="15" y="{middle}" text-anchor="middle" transform="rotate(-90 15 '
        f'{middle})">{html.escape(y_label)}</text>'
    )
    return [*parts, "</g>"]


def _flags(x: _Scale, flags: Sequence[Flag]) -> list[str]:
    """One line per step with the letters of all that happened there."""
    shown = [
        f
        for letter in sorted({f.letter for f in flags})
        for f in thin([f for f in flags if f.letter == letter], MAX_FLAGS)
    ]
    parts = []
    for step in sorted({f.step for f in shown}):
        here = [f for f in shown if f.step == step]
        letters = "".join(dict.fromkeys(f.letter for f in here))
        kind = "red" if "F" in letters else "plain"
        parts.append(
            f'<g class="chart-flag chart-flag--{kind}'
            f'"><title>{html.escape("; ".join(f.text for f in here))}</title><line '
            f'x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/><text '
            f'x="{x(step):.1f}" y="{TOP - 5}" text-anchor="middle">{letters}</text></g>'
        )
    return parts


def _curve(x: _Scale, y: _Scale, curve: Curve, index: int) -> list[str]:
    points = thin(curve.points, MAX_POINTS)
    path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)
    radius = 4 if curve.marker == "dot" else 1.7
    parts = [f'<g class="chart-series chart-series--{index}">', f'<polyline points="{path}"/>']
    for px, py in points:
        if error := curve.stderr.get(px):
            parts.append(
                f'<line x1="{x(px):.1f}" x2="{x(px):.1f}" y1="{y(py - error):.1f}" '
                f'y2="{y(py + error):.1f}"/>'
            )
        label = html.escape(f"{curve.name}, step {px:g}: {py:.4f} {curve.unit}")
        parts.append(
            f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" '
            f'r="{radius}"><title>{label}</title></circle>'
        )
    return [*parts, "</g>"]


def _legend(curves: Sequence[Curve]) -> list[str]:
    parts = []
    for i, curve in enumerate(curves):
        at = LEFT + i * 150
        parts.append(
            f'<g class="chart-series chart-series--{i}"><circle cx="{at + 5}" cy="10" r="4"/></g>'
            f'<text class="chart-legend" x="{at + 14}" y="14">{html.escape(curve.name)}</text>'
        )
    return parts


_LETTERS = {
    "C": "checkpoint",
    "E": "evaluation",
    "F": "a gate turned red",
    "N": "a value was not finite",
    "R": "resume",
    "S": "end of the run",
}


def _caption(curves: Sequence[Curve], flags: Sequence[Flag]) -> str:
    seen = [f"{k} {v}" for k, v in _LETTERS.items() if any(f.letter == k for f in flags)]
    thinned = [
        f"{c.name}: {MAX_POINTS} of {len(c.points)} points drawn"
        for c in curves
        if len(c.points) > MAX_POINTS
    ]
    return (
        ". ".join(
            [
                "Point at a mark for its step and value",
                *([f"Flags: {', '.join(seen)}"] if seen else []),
                *thinned,
            ]
        )
        + "."
    )

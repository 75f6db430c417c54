"""A loss curve as inline SVG, without script, with a title on every point."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup

from tools.site_pages.render import render

WIDTH, HEIGHT = 720, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 34, 46
MAX_POINTS, MAX_FLAGS = 140, 40
MEANINGS = {
    "C": "checkpoint",
    "E": "evaluation",
    "F": "a gate turned red",
    "N": "a value was not finite",
    "R": "resume",
    "S": "end of the run",
}


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

    @property
    def drawn(self) -> list[tuple[float, float]]:
        return thin(self.points, MAX_POINTS)


@dataclass(frozen=True)
class Flag:
    """An event at a step: one letter on the chart, the sentence on hover."""

    step: float
    letter: str
    text: str


@dataclass(frozen=True)
class Scale:
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
) -> Markup:
    """The figure as HTML without blank lines, or an empty string if no curve has a finite point."""
    finite = [replace(c, points=[p for p in c.points if math.isfinite(p[1])]) for c in curves]
    drawn = [c for c in finite if c.points]
    if not drawn:
        return Markup()
    xs = [x for c in drawn for x, _ in c.points] + [f.step for f in flags]
    ys = [y for c in drawn for _, y in c.points]
    return render(
        "chart.svg.j2",
        title=title,
        curves=drawn,
        flags=_flags_by_step(flags),
        x=Scale(*_range(xs, 0), LEFT, WIDTH - RIGHT),
        y=Scale(*_range(ys, 0.05), HEIGHT - BOTTOM, TOP),
        x_label=x_label,
        y_label=y_label,
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT}
        | {"top": TOP, "base": HEIGHT - BOTTOM, "middle": (TOP + HEIGHT - BOTTOM) / 2},
        max_points=MAX_POINTS,
        meanings=[f"{k} {v}" for k, v in MEANINGS.items() if any(f.letter == k for f in flags)],
    )


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - 0.5, high + 0.5
    return low - margin * (high - low), high + margin * (high - low)


def _flags_by_step(flags: Sequence[Flag]) -> list[tuple[float, str, str]]:
    """(step, letters, sentences) of every step with an event, thinned per letter."""
    shown = [
        f
        for letter in sorted({f.letter for f in flags})
        for f in thin([f for f in flags if f.letter == letter], MAX_FLAGS)
    ]
    by_step: dict[float, list[Flag]] = {}
    for flag in sorted(shown, key=lambda f: f.step):
        by_step.setdefault(flag.step, []).append(flag)
    return [
        (step, "".join(dict.fromkeys(f.letter for f in here)), "; ".join(f.text for f in here))
        for step, here in by_step.items()
    ]

"""Statistics of tensors, gathered on the device while a model runs and fetched once, each with what it was computed over.

R tokens (rows of the batch one after the other), C channels (all features, or all heads and their features)
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spec.errors import UsageError
from stack.trace.points import Point

SAMPLE = 4096  # values that quantiles are taken from
QUANTILES = (0.001, 0.5, 0.999)
BLOCK = 2**19  # values that a temporary holds at once: what a core's cache holds too
SHIFTED = 4.0  # mean² of so many variances, and the moments are taken again about the mean
FEW = 1e-12  # share of mean² below which a variance is not told from rounding of float64 sums


class SupportError(UsageError):
    """Two statistics of different things were compared. `field` names what differs."""

    def __init__(self, field: str, a: Any, b: Any):
        self.field = field
        super().__init__(
            f"these statistics are of different {field}, so their ratio says nothing",
            value=f"{a} and {b}",
            allowed="the same slot, shape, dtype, tokens and count",
            next_step="trace both over the same tokens and at the same point",
        )


@dataclass(frozen=True)
class Support:
    """What a statistic was computed over: point, shape as traced (batch and tokens first), dtype, tokens, and the count of values."""

    point: str
    slot: str
    shape: tuple[int, ...]
    dtype: str
    tokens: Literal["all", "last"]
    derived: bool
    n: int

    def differs(self, other: "Support") -> str | None:
        """The first field in which another support is not the same; None if both can be compared. Layers of one slot can."""
        return next((f.name for f in fields(self) if f.name != "point" and getattr(self, f.name) != getattr(other, f.name)), None)

    def require_same(self, other: "Support") -> None:
        """Raises SupportError naming the first field that differs."""
        if field := self.differs(other):
            raise SupportError(field, getattr(self, field), getattr(other, field))


@dataclass(frozen=True)
class Stat:
    """Figures of one tensor. Moments are those of the values themselves (÷ n); kurtosis is 3 for a normal distribution.

    `quantiles` are of `n_sampled` values at a fixed stride. `argmax` is (token, channel) of the largest magnitude, tokens counted over
    the rows of the batch; `top_token_energy_frac` is the share of the sum of squares that one token holds. Without any value, or with
    one that is not finite, what depends on it is NaN.
    """

    n: int
    mean: float
    std: float
    rms: float
    absmax: float
    min: float
    max: float
    quantiles: Mapping[str, float]
    n_sampled: int
    kurtosis: float
    frac_zero: float
    frac_nonfinite: float
    argmax: tuple[int, int] | None
    top_token: int | None
    top_token_energy_frac: float
    peak_energy_frac: float
    support: Support

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without the support."""
        return {k: v for k, v in asdict(self).items() if k != "support"} | {"quantiles": dict(self.quantiles)}


def ratio(a: Stat, b: Stat, name: str = "std") -> float:
    """`a.name / b.name`. Raises SupportError unless both were computed over the same kind of thing."""
    a.support.require_same(b.support)
    below = getattr(b, name)
    return getattr(a, name) / below if below else math.nan


class Gatherer:
    """Takes the figures of tensors as they come; `finish` fetches all of them at once."""

    def __init__(self, tokens: Literal["all", "last"] = "all"):
        self.tokens = tokens
        self.pending: dict[str, tuple[Support, Tensor, Tensor]] = {}
        self.room: Tensor | None = None

    @torch.no_grad()
    def see(self, point: Point, x: Tensor) -> None:
        """Note the figures of one tensor that begins with (B, T). A point that runs twice keeps the later one."""
        x = x.detach()
        if self.tokens == "last":
            x = x[:, -1:]
        support = Support(
            point.name, point.slot, tuple(x.shape), str(x.dtype).removeprefix("torch."), self.tokens, point.derived, x.numel()
        )
        if x.numel() == 0:
            self.pending[point.name] = support, torch.empty(0), torch.empty(0)
            return
        x_RC = x.flatten(2).flatten(0, 1) if x.ndim > 2 else x.reshape(x.shape[0] * x.shape[1], 1)
        if self.room is None:
            self.room = torch.empty(max(BLOCK, x_RC.shape[1]), device=x.device)
        room = self.room if self.room.device == x.device and x_RC.shape[1] <= len(self.room) else None
        self.pending[point.name] = support, figures(x_RC, room), _sample(x_RC).double()

    def finish(self) -> dict[str, Stat]:
        """All figures by point; one transfer from the device."""
        figured = [f for _, f, _ in self.pending.values() if f.numel()]
        samples = [s for _, _, s in self.pending.values() if s.numel()]
        lengths = [len(f) for f in figured] + [len(s) for s in samples]
        host = torch.cat([*figured, *samples]).cpu().split(lengths) if figured else []
        known = dict(zip([n for n, (_, f, _) in self.pending.items() if f.numel()], zip(host[: len(figured)], host[len(figured) :])))
        return {name: _stat(support, *known.get(name, (None, None))) for name, (support, _, _) in self.pending.items()}


def figures(x_RC: Tensor, room: Tensor | None = None) -> Tensor:
    """Figures of one tensor on its device, float64. On a CPU the moments are taken again where the first pass was no good.

    `room` is memory to work in: fresh memory for each tensor costs more than the arithmetic on it.
    """
    shift = None if x_RC.device.type == "cpu" else _sample(x_RC).mean()
    found = _moments(x_RC, shift, room)
    if shift is None and (better := _better(x_RC, *found[:4].tolist())) is not None:
        found = _moments(better, found[0] / x_RC.numel() if better is x_RC else better.mean(), None)
    return found


def _better(x_RC: Tensor, total: float, squares: float, cubes: float, fourths: float) -> Tensor | None:
    """What to take the moments of again: the same where the mean hides the spread, float64 where squares overflowed; None if neither."""
    if not math.isfinite(fourths):
        overflowed = x_RC.dtype != torch.float64 and bool(x_RC.isfinite().all())
        return x_RC.double() if overflowed else None
    mean, square = total / x_RC.numel(), squares / x_RC.numel()
    return x_RC if mean * mean > SHIFTED * max(0.0, square - mean * mean) else None


def sampled(R: int, C: int) -> tuple[int, int]:
    """Rows, and values of each, that quantiles of R rows of C values are taken from: at most SAMPLE values in all."""
    per_row = max(1, min(C, SAMPLE // R))
    return min(R, SAMPLE // per_row), per_row


@lru_cache(64)
def _places(R: int, C: int, device: torch.device) -> Tensor:
    """Where the sample of R rows of C values lies in them, counted through: a fixed stride, each row read from another channel on."""
    rows, per_row = sampled(R, C)
    at_r = torch.arange(rows, device=device)
    at_c = (torch.arange(per_row, device=device) * C // per_row + at_r[:, None] * 7919) % C
    return (at_r[:, None] * R // rows * C + at_c).flatten()


def _sample(x_RC: Tensor) -> Tensor:
    """The values that quantiles are taken from, float32 or wider."""
    places = _places(*x_RC.shape, x_RC.device)
    return x_RC.take(places).to(torch.promote_types(x_RC.dtype, torch.float32))


def _moments(x_RC: Tensor, shift: Tensor | None, room: Tensor | None) -> Tensor:
    """Σy, Σy², Σy³, Σy⁴, shift, min, max, energy of the top row, zeros, not finite, peak row, peak column, top row; y = x − shift.

    A block of rows at a time: few passes over memory that is still in the cache, sums of a row in float32 and over rows in float64.
    """
    wide = torch.promote_types(x_RC.dtype, torch.float32)
    c = None if shift is None else shift.to(wide)
    blocks: list[tuple[Tensor, ...]] = []
    for x in x_RC.split(max(1, BLOCK // x_RC.shape[1])):
        x = x.to(wide).contiguous()
        y = x if c is None else x - c
        square = torch.mul(y, y) if room is None or room.dtype != wide else torch.mul(y, y, out=room[: y.numel()].view(y.shape))
        flat, flat_square = y.view(-1), square.view(-1)
        high = torch.stack((torch.dot(flat_square, flat), torch.dot(flat_square, flat_square)))
        squares_R = square.sum(-1)
        energy_R = squares_R if c is None else torch.linalg.vector_norm(x, dim=-1).square_()
        blocks.append((energy_R, x.amax(-1), x.amin(-1), y.sum(-1), squares_R, high[:, None], _zeros(x, square if c is None else None)))
    energy_R, top_R, bottom_R, *parts, zeros = (torch.cat(b, -1) if len(b) > 1 else b[0] for b in zip(*blocks))
    sum_R, squares_R, high = parts
    low_moments, high_moments = torch.stack((sum_R, squares_R)).double().sum(-1), high.double().sum(-1)
    peak, top_row = torch.maximum(top_R, -bottom_R).argmax(), energy_R.argmax()
    column = x_RC.index_select(0, peak[None])[0].abs().argmax()
    extremes = torch.stack((bottom_R.min(), top_R.max(), energy_R[top_row])).double()
    places = torch.stack((zeros.sum(), _nonfinite(x_RC, low_moments[1]), peak, column, top_row)).double()
    c64 = torch.zeros_like(extremes[:1]) if c is None else c.double()[None]
    return torch.cat((low_moments, high_moments, c64, extremes, places))


def _zeros(x: Tensor, square: Tensor | None) -> Tensor:
    """How many values are zero, (1,) int64. On a CPU they are counted only where the smallest square is zero: a count costs four passes."""
    if x.device.type == "cpu" and square is not None and square.min() > 0:
        return torch.zeros(1, dtype=torch.int64)
    return (x.numel() - torch.count_nonzero(x))[None]


def _nonfinite(x_RC: Tensor, squares: Tensor) -> Tensor:
    """How many values are not finite: counted only where the sum of squares is not, or where asking would make the device wait."""
    if x_RC.device.type == "cpu" and math.isfinite(squares):
        return torch.zeros((), dtype=torch.int64)
    return (~x_RC.isfinite()).sum()


def _stat(support: Support, found: Tensor | None, sample: Tensor | None) -> Stat:
    """The figures in words."""
    if found is None:
        none = math.nan
        levels = {str(q): none for q in QUANTILES}
        return Stat(0, none, none, none, none, none, none, levels, 0, none, none, none, None, None, none, none, support)
    y_sum, y_squares, cubes, fourths, shift, low, high, top, zeros, broken, row, column, top_row = found.tolist()
    n = support.n
    m1, m2, m3, m4 = y_sum / n, y_squares / n, cubes / n, fourths / n
    all_squares = y_squares + 2 * shift * y_sum + n * shift * shift
    variance = m2 - m1 * m1
    variance = 0.0 if variance <= FEW * m2 else variance
    central = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
    rms = math.sqrt(all_squares / n) if all_squares >= 0 else math.nan
    absmax = math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)
    return Stat(
        n=n,
        mean=m1 + shift,
        std=math.sqrt(variance) if variance >= 0 else math.nan,
        rms=rms,
        absmax=absmax,
        min=low,
        max=high,
        quantiles=_quantiles(sample.numpy()),
        n_sampled=len(sample),
        kurtosis=central / variance / variance if variance > 0 else math.nan,
        frac_zero=zeros / n,
        frac_nonfinite=broken / n,
        argmax=(int(row), int(column)),
        top_token=int(top_row),
        top_token_energy_frac=top / all_squares if all_squares > 0 else math.nan,
        peak_energy_frac=absmax * absmax / all_squares if all_squares > 0 else math.nan,
        support=support,
    )


def _quantiles(sample: np.ndarray) -> dict[str, float]:
    """Quantiles, linear between neighbours; NaN if a value of the sample is."""
    values, found = np.sort(sample), {}
    for q in QUANTILES:
        place = q * (len(values) - 1)
        low, high = float(values[int(place)]), float(values[min(int(place) + 1, len(values) - 1)])
        found[str(q)] = math.nan if math.isnan(values[-1]) else low if low == high else low + (high - low) * (place - int(place))
    return found

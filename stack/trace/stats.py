"""Statistics of tensors, computed on the device while a model runs and fetched at the end.

R tokens (rows of the batch one after the other), C channels (all features,
or all heads and their features)
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stackproof.spec.errors import UsageError
from stackproof.trace.points import Point
from stackproof.trace.scratch import BufferPool, buffer_pool

SAMPLE = 4096  # values for quantiles
QUANTILES = (0.001, 0.5, 0.999)
BLOCK = 2**19  # values of a temporary: fits the cache of a core
SHIFTED = 4.0  # if mean² exceeds this many variances, moments are computed again about the mean
FEW = 1e-12  # share of mean² below which a variance is rounding of float64 sums


class SupportError(UsageError):
    """Two statistics with different supports were compared. `field` names the difference."""

    def __init__(self, field: str, a: Any, b: Any):
        self.field = field
        super().__init__(
            f"the two statistics differ in {field}, so their ratio has no meaning",
            value=f"{a} and {b}",
            allowed="the same slot, shape, dtype, tokens and count",
            next_step="trace both over the same tokens and at the same point",
        )


@dataclass(frozen=True)
class Support:
    """The support of a statistic: point, shape (batch and tokens first), dtype, tokens, number of
    values.
    """

    point: str
    slot: str
    shape: tuple[int, ...]
    dtype: str
    tokens: Literal["all", "last"]
    derived: bool
    n: int

    def differs(self, other: "Support") -> str | None:
        """The first field that differs, except `point`; None if the statistics can be compared."""
        return next(
            (
                f.name
                for f in fields(self)
                if f.name != "point" and getattr(self, f.name) != getattr(other, f.name)
            ),
            None,
        )


@dataclass(frozen=True)
class Stat:
    """Statistics of one tensor. Moments divide by n; kurtosis is 3 for a normal distribution.

    If squares overflow float32, a CPU sums in float64; on other devices the moments are infinite or
    NaN. `quantiles` are of `n_sampled` values at a fixed stride. `argmax` is (token, channel) of
    the largest magnitude, tokens counted over the rows of the batch; `top_token_energy_frac` is the
    largest share of one token in the sum of squares. For empty tensors and non-finite values,
    dependent fields are NaN.
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
        return {k: v for k, v in asdict(self).items() if k != "support"} | {
            "quantiles": dict(self.quantiles)
        }


class Gatherer:
    """Collects statistics of tensors; `finish` fetches all of them at once."""

    def __init__(self, tokens: Literal["all", "last"] = "all"):
        self.tokens = tokens
        self.seen: dict[str, Stat | tuple[Support, tuple[Tensor, ...]]] = {}
        self.pool = buffer_pool("figures")

    @torch.no_grad()
    def see(self, point: Point, x: Tensor) -> None:
        """Collect statistics of one tensor that begins with (B, T);
        of a point that runs twice the later one is kept.
        """
        x = x.detach()
        if self.tokens == "last":
            x = x[:, -1:]
        support = Support(
            point.name,
            point.slot,
            tuple(x.shape),
            str(x.dtype).removeprefix("torch."),
            self.tokens,
            point.derived,
            x.numel(),
        )
        if x.numel() == 0:
            self.seen[point.name] = _stat(support)
            return
        x_RC = x.flatten(2).flatten(0, 1) if x.ndim > 2 else x.reshape(x.shape[0] * x.shape[1], 1)
        found = (*moments(x_RC, self.pool), _sample(x_RC))
        # small tensors that outlive large ones would keep the heap of a CPU from shrinking
        self.seen[point.name] = _stat(support, *found) if _at_once(x) else (support, found)

    def finish(self) -> dict[str, Stat]:
        """All statistics by point; one transfer from the device for each dtype."""
        away = {name: one for name, one in self.seen.items() if not isinstance(one, Stat)}
        host = iter(_fetch([t for _, found in away.values() for t in found]))
        return self.seen | {
            name: _stat(support, *(next(host) for _ in found))
            for name, (support, found) in away.items()
        }


def _at_once(x: Tensor) -> bool:
    """Whether reading a number needs no synchronisation: on a CPU."""
    return x.device.type == "cpu"


def moments(x_RC: Tensor, pool: BufferPool) -> tuple[Tensor, ...]:
    """Sums and extremes of one tensor on its device; on a CPU computed again if
    the first pass was inexact.
    """
    if not _at_once(x_RC):
        return _moments(x_RC, _sample(x_RC).mean(), pool)
    found = _moments(x_RC, None, pool)
    sums = _sums(*found[:2])
    if (better := _better(x_RC, *sums)) is None:
        return found
    return _moments(
        better, torch.tensor(sums[0] / x_RC.numel()) if better is x_RC else better.mean(), pool
    )


def _better(
    x_RC: Tensor, total: float, squares: float, cubes: float, fourths: float
) -> Tensor | None:
    """Input of a second pass: the same if the mean hides the spread, float64 if squares overflowed;
    None if not needed.
    """
    if not math.isfinite(fourths):
        overflowed = x_RC.dtype != torch.float64 and bool(x_RC.isfinite().all())
        return x_RC.double() if overflowed else None
    mean, square = total / x_RC.numel(), squares / x_RC.numel()
    return x_RC if mean * mean > SHIFTED * max(0.0, square - mean * mean) else None


def sampled(R: int, C: int) -> tuple[int, int]:
    """Rows, and values of each, in the quantile sample of R rows of C values:
    at most SAMPLE values.
    """
    per_row = max(1, min(C, SAMPLE // R))
    return min(R, SAMPLE // per_row), per_row


@lru_cache(64)
def _sampled_places(R: int, C: int, device: torch.device) -> Tensor:
    """Flat indices of the sample of R rows of C values: a fixed stride,
    each row from another first channel.
    """
    rows, per_row = sampled(R, C)
    at_r = torch.arange(rows, device=device)
    at_c = (torch.arange(per_row, device=device) * C // per_row + at_r[:, None] * 7919) % C
    return (at_r[:, None] * R // rows * C + at_c).flatten()


def _sample(x_RC: Tensor) -> Tensor:
    """The quantile sample, float32 or wider."""
    places = _sampled_places(*x_RC.shape, x_RC.device)
    return x_RC.take(places).to(torch.promote_types(x_RC.dtype, torch.float32))


def _moments(x_RC: Tensor, shift: Tensor | None, pool: BufferPool) -> tuple[Tensor, ...]:
    """Partial sums of y = x − shift, on the device; the host adds them up.

    (5, R) energy, max, min, Σy, Σy² of each row; (2, blocks) Σy³ and Σy⁴ of each block; the shift;
    (4,) zeros, non-finite values, row and column of the peak. A block of rows at a time stays in
    the cache.
    """
    wide = torch.promote_types(x_RC.dtype, torch.float32)
    c = None if shift is None else shift.to(wide)
    blocks: list[tuple[Tensor, ...]] = []
    for x in x_RC.split(max(1, BLOCK // x_RC.shape[1])):
        x = x.to(wide).contiguous()
        y = x if c is None else x - c
        square = torch.mul(y, y, out=pool.take(y.numel(), wide, y.device).view(y.shape))
        flat, flat_square = y.view(-1), square.view(-1)
        squares_R = square.sum(-1)
        energy_R = squares_R if c is None else torch.linalg.vector_norm(x, dim=-1).square_()
        rows = torch.stack((energy_R, x.amax(-1), x.amin(-1), y.sum(-1), squares_R))
        high = torch.stack((torch.dot(flat_square, flat), torch.dot(flat_square, flat_square)))
        blocks.append((rows, high[:, None], _zeros(x, square if c is None else None)))
    rows_5R, high, zeros = (torch.cat(b, -1) if len(b) > 1 else b[0] for b in zip(*blocks))
    return rows_5R, high, high.new_zeros(()) if c is None else c, _places(x_RC, rows_5R, zeros)


def _places(x_RC: Tensor, rows_5R: Tensor, zeros: Tensor) -> Tensor:
    """(4,) int64: zeros, non-finite values, row and column of the peak.
    On a CPU with fewer torch operations.
    """
    if _at_once(x_RC):
        top_R, bottom_R, _, squares_R = rows_5R[1:].numpy()
        peak = int(np.maximum(top_R, -bottom_R).argmax())
        broken = 0 if math.isfinite(squares_R.sum()) else int((~x_RC.isfinite()).sum())
        return torch.tensor([int(zeros.sum()), broken, peak, int(x_RC[peak].abs().argmax())])
    peak = torch.maximum(rows_5R[1], -rows_5R[2]).argmax()
    column = x_RC.index_select(0, peak[None])[0].abs().argmax()
    return torch.stack((zeros.sum(), (~x_RC.isfinite()).sum(), peak, column))


def _sums(rows_5R: Tensor, high: Tensor) -> tuple[float, float, float, float]:
    """Σy, Σy², Σy³, Σy⁴ on the host, in float64."""
    return (
        *rows_5R[3:].numpy().sum(-1, dtype=np.float64).tolist(),
        *high.numpy().sum(-1, dtype=np.float64).tolist(),
    )


def _fetch(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors on the host, one transfer for each dtype and device."""
    host = list(tensors)
    together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        together.setdefault((t.device, t.dtype), []).append(i)
    for places in together.values():
        flat = torch.cat([tensors[i].flatten() for i in places]).cpu()
        for i, part in zip(places, flat.split([tensors[i].numel() for i in places])):
            host[i] = part.view(tensors[i].shape)
    return host


def _zeros(x: Tensor, square: Tensor | None) -> Tensor:
    """The number of zeros, (1,) int64.
    On a CPU counted only if the smallest square is zero: a count costs four passes.
    """
    # min() of all takes three times as long
    if _at_once(x) and square is not None and square.amin() > 0:
        return torch.zeros(1, dtype=torch.int64)
    return (x.numel() - torch.count_nonzero(x))[None]


def _stat(support: Support, *found: Tensor) -> Stat:
    """Statistics from the results of `moments` and the sample, on the host."""
    if not found:
        nothing = dict.fromkeys((f.name for f in fields(Stat)), math.nan)
        return Stat(
            **nothing
            | {
                "n": 0,
                "n_sampled": 0,
                "quantiles": {str(q): math.nan for q in QUANTILES},
                "argmax": None,
                "top_token": None,
                "support": support,
            }
        )
    rows_5R, high, shift, places, sample = found
    y_sum, y_squares, cubes, fourths = _sums(rows_5R, high)
    energy_R, top_R, bottom_R = rows_5R[:3].numpy()
    low, high, shift = float(bottom_R.min()), float(top_R.max()), float(shift)
    top_row = int(energy_R.argmax())
    zeros, broken, row, column = places.tolist()
    if broken:
        y_sum = y_squares = cubes = fourths = math.nan
    n = support.n
    m1, m2, m3, m4 = y_sum / n, y_squares / n, cubes / n, fourths / n
    all_squares = y_squares + 2 * shift * y_sum + n * shift * shift
    variance = m2 - m1 * m1
    variance = 0.0 if variance <= FEW * m2 else variance
    central = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1 * m1 * m1 * m1
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
        argmax=(row, column),
        top_token=top_row,
        top_token_energy_frac=float(energy_R[top_row]) / all_squares
        if all_squares > 0
        else math.nan,
        peak_energy_frac=absmax * absmax / all_squares if all_squares > 0 else math.nan,
        support=support,
    )


def _quantiles(sample: np.ndarray) -> dict[str, float]:
    """Quantiles with linear interpolation; NaN if the sample holds a NaN."""
    values, found = np.sort(sample), {}
    for q in QUANTILES:
        place = q * (len(values) - 1)
        low, high = float(values[int(place)]), float(values[min(int(place) + 1, len(values) - 1)])
        found[str(q)] = (
            math.nan
            if math.isnan(values[-1])
            else low
            if low == high
            else low + (high - low) * (place - int(place))
        )
    return found

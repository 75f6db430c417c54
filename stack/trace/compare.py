"""Compare two computations of the same ids, point by point: the error that arrives,
and the error that is added.

The reference `a` runs once and writes its tensors to a file. `b` runs freely, and then once more
with every value replaced by that of `a` after it was compared: an error in this run was added by
the operation before the point. One tensor of each variant is in memory at a time.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import BinaryIO

import torch
from torch import Tensor

from stackproof.spec.errors import UsageError
from stackproof.trace.kernel_errors import Kept, keeping, known_error
from stackproof.trace.model_variant import ModelVariant
from stackproof.trace.points import Point, select, sites
from stackproof.trace.stats import SupportError

CHUNK = 2**20  # values compared at a time
# Bound of what rounding adds at a point, times ε·√width. Measured over 15 settings of transformers
# against ours, and all variants of ours against float64, reference kernels and bfloat16, widths 48
# to 56: 0.22 (output of differential attention), mostly 0.1 to 0.17. CAP limits the bound whatever
# the precision is: in bfloat16 rounding adds 0.0036 at widths 256 and 1024, and 0.012 at the output
# of differential attention.
FACTOR, CAP = 1.0, 0.03
MISSING, MISSING_THERE = "did not run on this side", "did not run on the other side"
# hooked as the inputs of other functions, so a missing one is not a separate error
NOT_OWN = ("q_rotated", "k_rotated", "scores", "entropy", "attention_mixed", "resid_mid")


@dataclass(frozen=True)
class Difference:
    """‖a − b‖/‖b‖, the cosine, and Σ(a − b)²/Σb². NaN against a number is an infinite error."""

    rel_err: float
    cosine: float
    nmse: float


@dataclass(frozen=True)
class Compared:
    """One point of both variants.

    `arrived` is the error in a free run, `added_err` the error that the operation adds to correct
    inputs, `excess` the latter over its bound. `note` gives the reason for a missing value.
    """

    point: Point
    arrived: Difference | None
    added_err: float | None
    bound: float
    note: str = ""

    @property
    def excess(self) -> float:
        return 0.0 if self.added_err is None else self.added_err / self.bound


@dataclass(frozen=True)
class Comparison:
    """All common points in execution order.

    `first_divergence` is the first point that adds more than its bound, `suspects` all such points
    by excess. `way` is the known error of an attention kernel if that is the first divergence.
    """

    points: tuple[Compared, ...]
    first_divergence: Compared | None
    suspects: tuple[Compared, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    bound: str
    logits: Difference | None
    runs: int = 3
    way: str = ""


@dataclass
class Spill:
    """Tensors of one run in an open temporary file, read back one at a time."""

    file: BinaryIO
    places: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = field(default_factory=dict)

    def write(self, name: str, x: Tensor) -> None:
        """Append a tensor; of a point that runs twice the later one is kept."""
        x = x.detach().cpu().contiguous()
        self.places[name] = self.file.seek(0, os.SEEK_END), tuple(x.shape), x.dtype
        if x.numel():
            self.file.write(memoryview(x.view(-1).view(torch.uint8).numpy()))

    def read(self, name: str) -> Tensor:
        """A new tensor on the CPU."""
        at, shape, dtype = self.places[name]
        n_bytes = math.prod(shape) * dtype.itemsize
        if not n_bytes:
            return torch.empty(shape, dtype=dtype)
        self.file.seek(at)
        raw = bytearray(self.file.read(n_bytes))
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(shape)


@torch.no_grad()
def difference(a: Tensor, b: Tensor) -> Difference:
    """The error of `a` against the reference `b`, in float64, one chunk at a time."""
    sums = torch.zeros(4, dtype=torch.float64)
    for x, y in zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK)):
        x, y = x.double().cpu(), y.double().cpu()
        d = x - y
        sums += torch.stack([d @ d, x @ x, y @ y, x @ y])
    apart, aa, bb, ab = sums.tolist()
    if not math.isfinite(apart):
        same = torch.equal(a.double().cpu().nan_to_num(1e300), b.double().cpu().nan_to_num(1e300))
        return Difference(0.0, 1.0, 0.0) if same else Difference(math.inf, math.nan, math.inf)
    if bb == 0:
        return Difference(0.0, 1.0, 0.0) if apart == 0 else Difference(math.inf, math.nan, math.inf)
    return Difference(math.sqrt(apart / bb), ab / math.sqrt(aa * bb) if aa else 0.0, apart / bb)


def compare(
    a: ModelVariant, b: ModelVariant, input_ids: Tensor, names: Iterable[str] | None = None
) -> Comparison:
    """Compare `b` with the reference `a` on the same ids (B, T): where errors arrive,
    and where they are added.

    Points of one variant only are listed. Raises SupportError if a point has another shape in the
    other variant, except for experts, which choose their tokens; UsageError if no point is common.
    """
    common, only_a, only_b = common_points(a, b, names)
    points = [x.point for x in sites(b.model, b.where, common)]
    epsilon, width = coarsest(a, b), widest(a, b)
    with tempfile.TemporaryFile() as file:
        spill = Spill(file)
        record(a, common, input_ids, spill)
        free = _seen(b, common, input_ids, spill, forced=False)
        added = _seen(b, common, input_ids, spill, forced=True)
        ran = [p for p in points if p.name in spill.places or p.name in free]
        rows = tuple(
            _row(
                p,
                free.get(p.name),
                added.get(p.name),
                bound_of(p, epsilon, width, input_ids.shape[1]),
            )
            for p in ran
        )
        first = _first(rows)
        in_a_kernel = first is not None and first.point.slot == "attention_mixed"
        way = _diagnosis(b, first.point, common, input_ids, spill) if in_a_kernel else ""
    suspects = tuple(
        sorted(
            (r for r in rows if r.excess > 1 or r is first),
            key=lambda r: (r is not first or r.excess > 1, -r.excess),
        )
    )
    logits = free["logits"] if isinstance(free.get("logits"), Difference) else None
    of = f"ε = {epsilon:.3g} of the coarser side and width {width}"
    bound = f"{FACTOR:g} · ε · √width, with {of}; times √tokens for rotations; at most {CAP:g}"
    return Comparison(rows, first, suspects, only_a, only_b, bound, logits, 3 + in_a_kernel, way)


def _diagnosis(
    b: ModelVariant, point: Point, names: list[str], input_ids: Tensor, spill: Spill
) -> str:
    """The known error of the attention kernel at a point, from one more run on correct inputs;
    empty if unknown.
    """
    layers = sorted({s.point.layer for s in sites(b.model, b.where) if s.point.slot == point.slot})
    kept: list[Kept] = []
    _seen(
        b,
        names,
        input_ids,
        spill,
        forced=True,
        inside=lambda: keeping(b.where.function, layers.index(point.layer), kept),
    )
    return known_error(kept[0]) if kept else ""


def _seen(
    b: ModelVariant,
    names: list[str],
    input_ids: Tensor,
    spill: Spill,
    *,
    forced: bool,
    inside: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Difference | str]:
    """One run of `b` against the tensors of `a`; if `forced`,
    each value is replaced after the comparison.
    """
    found: dict[str, Difference | str] = {}

    def handler(point: Point, x: Tensor) -> Tensor | None:
        theirs = spill.read(point.name) if point.name in spill.places else None
        found[point.name] = _compared(point, theirs, x)
        return fitted(theirs, x) if forced and point.flows else None

    with torch.no_grad(), b.running(input_ids, names, handler, inside=inside):
        return found


def fitted(theirs: Tensor | None, x: Tensor) -> Tensor | None:
    """`theirs` with device, dtype and shape of `x`; None if it is missing or has another size."""
    if theirs is None or theirs.numel() != x.numel():
        return None
    return theirs.to(x.device, x.dtype).reshape(x.shape)


def common_points(
    a: ModelVariant, b: ModelVariant, names: Iterable[str] | None
) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """Names of the points of both variants in order, of `a` alone, and of `b` alone."""
    wanted = [names] if isinstance(names, str) else None if names is None else list(names)
    have = []
    for s in (a, b):
        found = sites(s.model, s.where, s.names)
        chosen = found if wanted is None else select(found, wanted, s.where)
        have.append([x.point.name for x in chosen])
    in_a, in_b = set(have[0]), set(have[1])
    common = [n for n in have[1] if n in in_a]
    if not common:
        raise UsageError(
            "the two models have no point in common", value=f"{a.where.family} and {b.where.family}"
        )
    return (
        common,
        tuple(n for n in have[0] if n not in in_b),
        tuple(n for n in have[1] if n not in in_a),
    )


def record(a: ModelVariant, names: list[str], input_ids: Tensor, spill: Spill) -> None:
    """Run a variant once and spill its tensors, the logits included."""
    with (
        torch.no_grad(),
        a.running(input_ids, names, lambda p, x: spill.write(p.name, x)) as logits,
    ):
        if "logits" not in spill.places:
            spill.write("logits", logits)


def _compared(point: Point, theirs: Tensor | None, x: Tensor) -> Difference | str:
    if theirs is None:
        return MISSING_THERE
    if theirs.numel() == x.numel() and theirs.shape[:2] == x.shape[:2]:
        return difference(x, theirs)
    if point.slot.startswith("experts"):
        return f"saw other tokens: shape {tuple(theirs.shape)} and {tuple(x.shape)}"
    raise SupportError("shape", f"{point.name} {tuple(theirs.shape)}", tuple(x.shape))


def _row(
    point: Point, free: Difference | str | None, added: Difference | str | None, bound: float
) -> Compared:
    notes = [
        n if isinstance(n, str) else MISSING for n in (free, added) if not isinstance(n, Difference)
    ]
    arrived = free if isinstance(free, Difference) else None
    return Compared(
        point,
        arrived,
        added.rel_err if isinstance(added, Difference) else None,
        bound,
        "; ".join(dict.fromkeys(notes)),
    )


def _first(rows: Sequence[Compared]) -> Compared | None:
    """The first point above its bound; if modules right before it ran in one variant only, the
    first of these.

    Inputs of an attention function or a norm are not hooked if another function is called, which is
    not an error.
    """
    at = next((i for i, r in enumerate(rows) if r.excess > 1), None)
    if at is None:
        return None
    start = at
    while start and rows[start - 1].note in (MISSING, MISSING_THERE):
        start -= 1
    return next((r for r in rows[start:at] if r.point.slot not in NOT_OWN), rows[at])


def coarsest(a: ModelVariant, b: ModelVariant) -> float:
    """The largest ε of all parameter dtypes and declared compute dtypes."""
    held = {p.dtype for s in (a, b) for p in s.model.parameters()} | {
        s.computes for s in (a, b) if s.computes is not None
    }
    return max(torch.finfo(d).eps for d in held if d.is_floating_point)


def widest(a: ModelVariant, b: ModelVariant) -> int:
    """d_model: the maximum over all matrices of their second-largest dimension."""
    return max(
        (sorted(p.shape)[-2] for s in (a, b) for p in s.model.parameters() if p.ndim >= 2),
        default=1,
    )


def bound_of(point: Point, epsilon: float, width: int, tokens: int) -> float:
    """Upper bound of the rounding error that the operation of a point adds."""
    return min(
        CAP,
        FACTOR
        * epsilon
        * math.sqrt(width)
        * (math.sqrt(tokens) if point.slot in ("q_rotated", "k_rotated") else 1.0),
    )

"""Two computations of the same ids, point by point: the error that arrives at a point, and the
error that its own operation adds.

The first side runs once and leaves its tensors in a file. The second runs freely, and then once
more with every value put right after it was compared: what still differs at a point was made there.
One tensor of each side is in memory at a time.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stackproof.spec.errors import UsageError
from stackproof.trace.kernel_errors import Kept, keeping, way_to_err
from stackproof.trace.points import Point, select, sites
from stackproof.trace.stats import SupportError
from stackproof.trace.tap import tap
from stackproof.trace.trace import run
from stackproof.trace.ways import Side

CHUNK = 2**20  # values that are compared at a time
# What rounding adds at a point is at most this times ε·√width. Measured over 15 settings of
# transformers against ours, and all variants of ours against float64, reference kernels and
# bfloat16, widths 48 to 56: 0.22 (differential attention's output), mostly 0.1 to 0.17. However
# coarse the numbers are, no operation that is off by more than CAP of its value passes for
# rounding: in bfloat16 rounding adds 0.0036 at width 256 and at 1024, and 0.012 at differential
# attention's output.
FACTOR, CAP = 1.0, 0.03
MISSING, MISSING_THERE = "did not run on this side", "did not run on the other side"
# seen as what others are given
NOT_OWN = ("q_rotated", "k_rotated", "scores", "entropy", "attention_mixed", "resid_mid")


@dataclass(frozen=True)
class Difference:
    """‖a − b‖/‖b‖, the cosine of both, and Σ(a − b)²/Σb²; NaN against a
    number is infinitely far.
    """

    rel_err: float
    cosine: float
    nmse: float


@dataclass(frozen=True)
class Compared:
    """One point of both sides. `arrived` is the error that is there in a free run, `added_err` what
    the operation before it adds to right inputs; `excess` is the latter over its bound. `note` says
    why a figure is missing.
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
    `first_divergence` is the first that adds more than its bound; `suspects` rank all of these.

    Where that is an attention kernel, `way` says in which usual way it errs, if in one of them.
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
    """Tensors of a forward in a file, read back one at a time."""

    folder: Path
    places: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = field(default_factory=dict)

    def __post_init__(self):
        self.path = self.folder / "tensors"
        self.path.touch()

    def write(self, name: str, x: Tensor) -> None:
        """Append a tensor; a point that runs twice keeps the later one."""
        x = x.detach().cpu().contiguous()
        self.places[name] = self.path.stat().st_size, tuple(x.shape), x.dtype
        if x.numel():
            with open(self.path, "ab") as f:
                f.write(memoryview(x.view(-1).view(torch.uint8).numpy()))

    def read(self, name: str) -> Tensor:
        """A tensor of its own, on the CPU."""
        at, shape, dtype = self.places[name]
        n_bytes = math.prod(shape) * dtype.itemsize
        if not n_bytes:
            return torch.empty(shape, dtype=dtype)
        with open(self.path, "rb") as f:
            f.seek(at)
            raw = bytearray(f.read(n_bytes))
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(shape)


@torch.no_grad()
def difference(a: Tensor, b: Tensor) -> Difference:
    """How far `a` is from `b`, which is taken as right, in float64, a chunk at a time."""
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


def compare(a: Side, b: Side, input_ids: Tensor, names: Iterable[str] | None = None) -> Comparison:
    """Compare what two sides compute of the same ids (B, T): where their errors arrive,
    and where they are made.

    Points that one side lacks are listed and not compared. Raises SupportError where a point has
    another shape on the other side, unless which tokens it saw is the model's own choice, as with
    experts; UsageError if no point is common.
    """
    common, only_a, only_b = common_points(a, b, names)
    points = [x.point for x in select(sites(b.model, b.where), common, b.where)]
    epsilon, width = coarsest(a, b), widest(a, b)
    with tempfile.TemporaryDirectory(prefix="stackproof-compare-") as folder:
        spill = Spill(Path(folder))
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
        way = _way(b, first.point, common, input_ids, spill) if in_a_kernel else ""
    suspects = tuple(
        sorted(
            (r for r in rows if r.excess > 1 or r is first),
            key=lambda r: (r is not first or r.excess > 1, -r.excess),
        )
    )
    logits = free["logits"] if isinstance(free.get("logits"), Difference) else None
    of = f"ε = {epsilon:.3g} of the coarser side and width {width}"
    said = f"{FACTOR:g} · ε · √width, with {of}; times √tokens for rotations; at most {CAP:g}"
    return Comparison(rows, first, suspects, only_a, only_b, said, logits, 3 + in_a_kernel, way)


def _way(b: Side, point: Point, names: list[str], input_ids: Tensor, spill: Spill) -> str:
    """In which usual way the attention kernel at a point errs, from one more run on right values;
    empty where in none.
    """
    layers = sorted({s.point.layer for s in sites(b.model, b.where) if s.point.slot == point.slot})
    kept: list[Kept] = []
    _seen(
        b,
        names,
        input_ids,
        spill,
        forced=True,
        watched=lambda: keeping(b.where.function, layers.index(point.layer), kept),
    )
    return way_to_err(kept[0]) if kept else ""


def _seen(
    b: Side,
    names: list[str],
    input_ids: Tensor,
    spill: Spill,
    *,
    forced: bool,
    watched: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Difference | str]:
    """One run of a side against the tensors of the other; if `forced`,
    each value is put right after it was compared.
    """
    found: dict[str, Difference | str] = {}

    def handler(point: Point, x: Tensor) -> Tensor | None:
        theirs = spill.read(point.name) if point.name in spill.places else None
        found[point.name] = _compared(point, theirs, x)
        right = forced and point.flows and theirs is not None and theirs.numel() == x.numel()
        return theirs.to(x.device).reshape(x.shape) if right else None

    with torch.no_grad(), b.around():
        inputs = b.inputs()
        with watched(), tap(b.model, names, handler, where=b.where):
            run(b.model, input_ids, inputs)
    return found


def common_points(
    a: Side, b: Side, names: Iterable[str] | None
) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """Names of the points of both sides in order, and of those that only one has."""
    asked = [names] if isinstance(names, str) else None if names is None else list(names)
    have = []
    for s in (a, b):
        found = sites(s.model, s.where, None)
        found = (
            found if s.names is None else [x for x in found if x in select(found, s.names, s.where)]
        )
        have.append(
            [x.point.name for x in (found if asked is None else select(found, asked, s.where))]
        )
    in_a, in_b = set(have[0]), set(have[1])
    common = [n for n in have[1] if n in in_a]
    if not common:
        raise UsageError(
            "the two sides have no point in common", value=f"{a.where.family} and {b.where.family}"
        )
    return (
        common,
        tuple(n for n in have[0] if n not in in_b),
        tuple(n for n in have[1] if n not in in_a),
    )


def record(a: Side, names: list[str], input_ids: Tensor, spill: Spill) -> Tensor:
    """Run a side once and keep its tensors; gives its logits."""
    with torch.no_grad(), a.around():
        inputs = a.inputs()
        with tap(a.model, names, lambda p, x: spill.write(p.name, x), where=a.where):
            logits = run(a.model, input_ids, inputs)
    if "logits" not in spill.places:
        spill.write("logits", logits)
    return logits


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
    """The first point that adds more than its bound; or of the modules right before it that ran on
    one side only, the first.

    What is given to an attention function, or to a norm, is not seen where another is called,
    and does not err for that.
    """
    at = next((i for i, r in enumerate(rows) if r.excess > 1), None)
    if at is None:
        return None
    start = at
    while start and rows[start - 1].note in (MISSING, MISSING_THERE):
        start -= 1
    return next((r for r in rows[start:at] if r.point.slot not in NOT_OWN), rows[at])


def coarsest(a: Side, b: Side) -> float:
    """The largest ε among the dtypes of both sides' parameters,
    and those in which they say that they compute.
    """
    held = {p.dtype for s in (a, b) for p in s.model.parameters()} | {
        s.computes for s in (a, b) if s.computes is not None
    }
    return max(torch.finfo(d).eps for d in held if d.is_floating_point)


def widest(a: Side, b: Side) -> int:
    """The largest of the matrices' smaller dimensions: d_model,
    however long the vocabulary and the feed-forward are.
    """
    return max(
        (sorted(p.shape)[-2] for s in (a, b) for p in s.model.parameters() if p.ndim >= 2),
        default=1,
    )


def bound_of(point: Point, epsilon: float, width: int, tokens: int) -> float:
    """What the operation of a point may add by rounding alone."""
    return min(
        CAP,
        FACTOR
        * epsilon
        * math.sqrt(width)
        * (math.sqrt(tokens) if point.slot in ("q_rotated", "k_rotated") else 1.0),
    )

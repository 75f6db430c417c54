"""Reads a loss from its gradient at the logits: the target of each position, and its weight.

For L = Σ w·CE(logits, y) the gradient at one position is w·(softmax − onehot(y)). So y and w can be
read off, wherever the loss was computed: in the model, in a trainer's own function or in a
loop. In clean float32 runs of a Llama and a GPT-2 of width 32, w was right to 1e-6.

Nothing here waits for the device: `read` leaves its figures there, and `resolve` fetches those of a
whole step in one copy. B batch, T tokens, V vocab
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stackproof.contracts.loss import IGNORE

SAMPLED = 64
STRIPS = 16
# of the gradient's norm; the right target left at most 2.1e-3 in bfloat16, another 0.87 or more
FIT_MAX = 0.1
CHUNK_ENTRIES = 2**24  # logits that are held at a time
CLEAR = 0.05  # positions whose softmax is closer to their label than this are not inspected
EVERY_CLEAR = 1e-3  # the same where every place is judged, through the head


@dataclass
class Reading:
    """What is read off the gradient of one micro-step at the logits. `weights` are those of
    inspected positions, or means over groups of them; `single_weights` are the least and the
    largest of a single position.
    """

    n_learned: int = 0
    n_expected: int = 0
    n_labels: int = 0
    n_judged: int = 0
    n_masked_learned: int = 0
    offsets: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    single_weights: tuple[float, ...] = ()
    nats: list[float] = field(default_factory=list)
    vocab_size: int = 0
    half: bool = False
    finite: bool = True


def silent_places(
    ids_BT: Tensor,
    mask_BT: Tensor | None,
    labels_BT: Tensor | None,
    pad_id: int | None,
    eos_id: int | None,
) -> Tensor:
    """Places t (B, T-1) whose next token is not to be learned: padding, or a label of -100.

    Labels may be aligned with their own token or shifted by one place; comparing tokens
    shows which.
    """
    silent = torch.zeros_like(ids_BT[:, 1:], dtype=torch.bool)
    if mask_BT is not None and mask_BT.shape == ids_BT.shape:
        silent |= mask_BT[:, 1:] == 0
    elif pad_id is not None:
        silent |= trailing_padding(ids_BT, pad_id, eos_id)[:, 1:]
    if labels_BT is not None and labels_BT.shape == ids_BT.shape:
        silent |= (
            torch.where(is_ahead(ids_BT, labels_BT), labels_BT[:, :-1], labels_BT[:, 1:]) == IGNORE
        )
    return silent


def is_closed(ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """() bool: whether most labels are those of their own token, and few are those of the next, so
    that the last place of a row has nothing to learn.
    """
    valid = labels_BT != IGNORE
    here = (valid & (labels_BT == ids_BT)).sum()
    ahead = (valid[:, :-1] & (labels_BT[:, :-1] == ids_BT[:, 1:])).sum()
    return (2 * here > valid.sum()) & (2 * ahead < here)


def is_ahead(ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """() bool: whether labels are shifted by one place, for a loss that does not shift them."""
    here, ahead = labels_BT == ids_BT, labels_BT[:, :-1] == ids_BT[:, 1:]
    valid = labels_BT != IGNORE
    return (ahead & valid[:, :-1]).sum() > (here & valid).sum()


def trailing_padding(ids_BT: Tensor, pad_id: int, eos_id: int | None) -> Tensor:
    """(B, T) bool: the run of `pad_id` at the end of each row. Its first token is text where
    padding is also the stop token.
    """
    tail = (ids_BT == pad_id).flip(1).cumprod(1).flip(1).bool()
    if pad_id == eos_id:
        tail &= torch.cat([torch.zeros_like(tail[:, :1]), tail[:, :-1]], 1)
    return tail


@dataclass(frozen=True)
class Unread:
    """A reading whose figures are still on the device."""

    counts: Tensor  # (5,) float64: learned, expected, masked learned, labels, whether all is finite
    # (5, N) float64: whether a place is judged, its offset, weight, nats, and whether it counts
    places: Tensor
    vocab_size: int
    half: bool  # values or gradient have a type of two bytes
    group: int  # places whose weights are averaged


@torch.no_grad()
def read(
    values: Tensor,
    gradient: Tensor,
    ids_BT: Tensor,
    silent: Tensor,
    *,
    next_BT: Tensor | None = None,
    head: Tensor | None = None,
    scale: float = 1.0,
    smoothing: float = 0.0,
    n_labels: Tensor | None = None,
    loss: Tensor | None = None,
    closed: Tensor | None = None,
    turn: int = 0,
) -> Unread:
    """Reading of one backward pass from logits (B, T, V), or from what enters a head of weight
    `head` (V, D), and its gradient.

    A loss that never builds the logits, as fused ones do, is read through the head: a gradient g at
    the logits is g·head before it. The head multiplies in the type of `values`, as in the run.
    `silent` is (B, T-1) bool, `scale` what the loss was multiplied with, as by a loss scaler. A NaN
    among the values is sought at every place, in a strip of one STRIPS-th of the vocabulary,
    another at each `turn`; the gradient is read whole.

    Without `next_BT` the last place of a row is counted and not judged: its next token is not in
    the row. Where `closed`, a bool tensor, is true, nothing is to be learned there. At most SAMPLED
    places are then judged one by one, evenly spread; where nothing is learned, places that should
    be. With `next_BT`, the token that follows each place, `silent` is (B, T), and every place that
    is to be learned is judged, whether it has a gradient or not.
    """
    norm_BT = gradient.norm(dim=-1, dtype=torch.float32)
    learned, expected = norm_BT[:, : silent.shape[1]] > 0, ~silent
    finite = (
        norm_BT.isfinite().all() & ~values.tensor_split(STRIPS, -1)[turn % STRIPS].sum().isnan()
    )
    if loss is not None:
        finite = finite & loss.isfinite()
    none = (
        torch.zeros((), dtype=torch.int64, device=ids_BT.device) if n_labels is None else n_labels
    )
    masked = (learned & silent).sum()
    if closed is not None:
        masked = masked + (closed & (norm_BT[:, -1] > 0)).sum()
    counts = torch.stack([(norm_BT > 0).sum(), expected.sum(), masked, none, finite]).double()
    every = next_BT is not None
    if not every:
        next_BT = ids_BT.roll(-1, 1)
        rows, at, chosen = _spread(learned & expected, expected)
    else:
        index = torch.arange(silent.numel(), device=ids_BT.device)
        rows, at, chosen = index // silent.shape[1], index % silent.shape[1], expected.flatten()
    head = None if head is None else head.to(values.dtype)
    wide = None if head is None else head.float()
    vocab_size = values.shape[-1] if head is None else head.shape[0]
    last, parts = silent.shape[1] - 1, []
    for part in zip(*(t.split(max(SAMPLED, CHUNK_ENTRIES // vocab_size)) for t in (rows, at))):
        after = (part[1] + 1).clamp_max(last)
        targets = [ids_BT[part], next_BT[part], next_BT[part[0], after]]
        fitted = _Fitted(values[part], gradient[part].float(), scale, smoothing, head, wide)
        parts.append(fitted.judged(targets, part[1] < last, EVERY_CLEAR if every else CLEAR))
    places = torch.cat(parts, 1)
    places[0] *= chosen
    places = torch.cat([places, chosen.double()[None]])
    half = min(values.element_size(), gradient.element_size()) < 4
    # Where a kernel rounds a logit the other way, one place is off and its neighbours are not.
    return Unread(counts, places, vocab_size, half, SAMPLED if half and every else 1)


def resolve(
    unread: Sequence[Unread], more: Sequence[Tensor] = ()
) -> tuple[list[Reading], list[Tensor]]:
    """Fetch what was read in one step, and further float64 vectors,
    with one copy from the device.
    """
    parts = [t.flatten() for u in unread for t in (u.counts, u.places)] + list(more)
    if not parts:
        return [], []
    home = parts[0].device
    fetched = list(torch.cat([p.to(home) for p in parts]).cpu().split([p.numel() for p in parts]))
    n = 2 * len(unread)
    return [_reading(u, *fetched[2 * i : 2 * i + 2]) for i, u in enumerate(unread)], fetched[n:]


def _reading(unread: Unread, counts: Tensor, places: Tensor) -> Reading:
    learned, expected, masked, labels, finite = map(int, counts.tolist())
    found = Reading(
        n_learned=learned,
        n_expected=expected,
        n_labels=labels,
        n_masked_learned=masked,
        vocab_size=unread.vocab_size,
        half=unread.half,
        finite=bool(finite),
    )
    if finite:
        judged, offsets, weights, nats, chosen = places.reshape(5, -1)
        read_at = judged.bool() & (offsets >= 0)
        found.nats = nats[chosen.bool()].tolist()
        found.offsets = offsets[judged.bool()].int().tolist()
        single = weights[read_at]
        groups = single.tensor_split(max(1, len(single) // unread.group))
        found.weights = [float(w.mean()) for w in groups if len(w)]
        found.single_weights = (float(single.min()), float(single.max())) if len(single) else ()
        found.n_judged = len(found.offsets)
    return found


def _spread(first_BT: Tensor, otherwise_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, place, whether it counts) of SAMPLED places, evenly spread over those of the first
    mask, or of the other where the first is empty.
    """
    flags = torch.where(first_BT.any(), first_BT, otherwise_BT).flatten()
    so_far = flags.cumsum(0)
    n = so_far[-1:] if len(so_far) else so_far.new_zeros(1)
    steps = torch.arange(SAMPLED, device=flags.device, dtype=torch.float64) / (SAMPLED - 1)
    rank = 1 + (steps * (n - 1).clamp_min(0)).round().long()
    index = torch.searchsorted(so_far, rank).clamp_max(max(len(so_far) - 1, 0))
    fresh = torch.cat([torch.ones_like(index[:1]), (index[1:] != index[:-1]).long()]).bool()
    width = max(first_BT.shape[1], 1)
    return index // width, index % width, fresh & (n > 0)


def _at(p_NV: Tensor, y_N: Tensor) -> Tensor:
    return p_NV.gather(1, y_N.long()[:, None])[:, 0].double()


def _dot(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """Row by row (N,), without an elementwise product: at 64 rows of a vocabulary, allocating it
    took most of the time.
    """
    return torch.bmm(a_ND[:, None], b_ND[:, :, None]).flatten().double()


def _norm(x_ND: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_ND, dim=1, dtype=torch.float64)


class _Fitted:
    """How well gradients at places fit cross-entropy with a given token. What does not depend on
    the token is computed once.

    `values` and gradients are logits (N, V), or enter a head of weight `head`, in float32 `wide`.
    The gradient for
    target y is w·d with d = p − s/V + (s − 1)·onehot(y), s the smoothing, times the head where
    there is one.
    """

    def __init__(
        self,
        values: Tensor,
        g_N: Tensor,
        scale: float,
        smoothing: float,
        head: Tensor | None,
        wide: Tensor | None,
    ):
        self.g_N, self.scale, self.kept, self.head = g_N, scale, 1 - smoothing, wide
        logits_NV = values if head is None else values @ head.T
        self.log_p_NV = logits_NV.float().log_softmax(-1)
        p_NV = self.log_p_NV.exp()
        base = p_NV - smoothing / p_NV.shape[1] if smoothing else p_NV
        self.base = base if head is None else base @ self.head
        if head is None:
            self.gg, self.bb = (_norm(g_N) / scale).square(), _norm(self.base).square()
            self.gb = _dot(g_N, self.base) / scale

    def judged(self, targets: Sequence[Tensor], has_after: Tensor, clear: float) -> Tensor:
        """(4, N) float64: whether the softmax is further than `clear` from the label, the offset
        of the target among the token itself, the next and the one after (-1: none of them), weight,
        and nats of the next token.
        """
        inside = (torch.ones_like(has_after), torch.ones_like(has_after), has_after)
        fits, weights = zip(*map(self._fit, targets, inside))
        best = torch.where(fits[1] <= FIT_MAX, 1, torch.stack(fits).argmin(0))
        offset = torch.where(torch.stack(fits).amin(0) <= FIT_MAX, best, -1)
        weight = torch.stack(weights).gather(0, best[None])[0]
        log_p = _at(self.log_p_NV, targets[1])
        return torch.stack([(1 - log_p.exp() > clear).double(), offset.double(), weight, -log_p])

    def _fit(self, y_N: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """(share of the gradient that is not explained, weight) if the targets are `y_N`."""
        if self.head is not None:
            # The difference itself: its norm is far below that of both terms where p is near 1.
            g_ND, d_ND = self.g_N / self.scale, self.base - self.kept * self.head[y_N]
            weight = _dot(g_ND, d_ND) / _norm(d_ND).square().clamp_min(1e-30)
            left = _norm(g_ND - weight.float()[:, None] * d_ND) / _norm(g_ND).clamp_min(1e-150)
            return torch.where(inside & (weight > 0), left, torch.inf), weight
        gd = self.gb - self.kept * _at(self.g_N, y_N) / self.scale
        dd = (self.bb - 2 * self.kept * _at(self.base, y_N) + self.kept**2).clamp_min(1e-30)
        weight = gd / dd
        left = ((self.gg - gd * weight).clamp_min(0) / self.gg.clamp_min(1e-300)).sqrt()
        return torch.where(inside & (weight > 0), left, torch.inf), weight

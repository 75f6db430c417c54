"""Reads a loss from its gradient at the logits: what each position is taught, and how much that weighs.

For L = Σ w·CE(logits, y) the gradient at one position is w·(softmax − onehot(y)). So y and w can be read off, whoever computed the loss
and wherever: in the model, in a trainer's own function or in a loop. In clean float32 runs of a Llama and a
GPT-2 of width 32, w was right to 1e-7.
B batch, T tokens, V vocab
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORE = -100
SAMPLED = 64
FIT_MAX = 0.1  # of the gradient's norm; the right target left at most 2.1e-3 in bfloat16, another 0.87 or more
CLEAR = 0.05  # positions whose softmax is closer to their label than this tell nothing exact


@dataclass
class Reading:
    """What one micro-step's gradient at the logits says. `weights` are those of judged positions, times the loss's scale."""

    n_learned: int = 0
    n_expected: int = 0
    n_labels: int = 0
    n_judged: int = 0
    n_masked_learned: int = 0
    offsets: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    vocab_size: int = 0
    finite: bool = True


def silent_places(ids_BT: Tensor, mask_BT: Tensor | None, labels_BT: Tensor | None, pad_id: int | None, eos_id: int | None) -> Tensor:
    """Places t (B, T-1) whose next token is not to be learned: padding, or a label of -100.

    Labels may stand with their own token, or already one place ahead; which of both is read off the tokens.
    """
    silent = torch.zeros_like(ids_BT[:, 1:], dtype=torch.bool)
    if mask_BT is not None and mask_BT.shape == ids_BT.shape:
        silent |= mask_BT[:, 1:] == 0
    elif pad_id is not None:
        silent |= trailing_padding(ids_BT, pad_id, eos_id)[:, 1:]
    if labels_BT is not None and labels_BT.shape == ids_BT.shape:
        silent |= (labels_BT[:, :-1] if is_ahead(ids_BT, labels_BT) else labels_BT[:, 1:]) == IGNORE
    return silent


def is_ahead(ids_BT: Tensor, labels_BT: Tensor) -> bool:
    """Whether labels stand one place ahead of their tokens, as a loss that does not shift wants them."""
    here, ahead = labels_BT == ids_BT, labels_BT[:, :-1] == ids_BT[:, 1:]
    valid = labels_BT != IGNORE
    return bool((ahead & valid[:, :-1]).sum() > (here & valid).sum())


def trailing_padding(ids_BT: Tensor, pad_id: int, eos_id: int | None) -> Tensor:
    """Places (B, T) of the run of `pad_id` that ends a row; the first of the run is text where padding is also the stop token."""
    tail = (ids_BT == pad_id).flip(1).cumprod(1).flip(1).bool()
    if pad_id == eos_id:
        tail &= torch.cat([torch.zeros_like(tail[:, :1]), tail[:, :-1]], 1)
    return tail


@torch.no_grad()
def read(
    values: Tensor,
    gradient: Tensor,
    ids_BT: Tensor,
    silent: Tensor,
    *,
    head: Tensor | None = None,
    scale: float = 1.0,
    smoothing: float = 0.0,
) -> Reading:
    """Reading of one backward pass from logits (B, T, V), or from what enters a head of weight `head` (V, D), and its gradient.

    A loss that never builds the logits, as fused ones do, is read through the head: a gradient g at the logits is g·head before it.
    `silent` is (B, T-1) bool, `scale` what the loss was multiplied with, as by a loss scaler.

    The last place of a row is counted and not judged: its next token is not in the row. At most SAMPLED places are judged one by one,
    evenly spread; where nothing is learned, places that should be.
    """
    norm_BT = gradient.float().norm(dim=-1)
    learned = norm_BT[:, :-1] > 0
    finite = bool(torch.isfinite(norm_BT).all()) and not bool(torch.isnan(values.sum()))
    expected = ~silent
    found = Reading(
        n_learned=int((norm_BT > 0).sum()),
        n_expected=int(expected.sum()),
        n_masked_learned=int((learned & silent).sum()),
        vocab_size=values.shape[-1] if head is None else head.shape[0],
        finite=finite,
    )
    places = (learned & expected if bool((learned & expected).any()) else expected).nonzero()
    if not finite or not len(places):
        return found
    chosen = places[torch.linspace(0, len(places) - 1, min(SAMPLED, len(places)), device=places.device).round().long()]
    rows, at = chosen.unbind(1)
    head = None if head is None else head.double()
    p_NV = (values[rows, at].double() if head is None else values[rows, at].double() @ head.T).softmax(-1)
    g_N = gradient[rows, at].double() / scale
    fits, weights, clear = zip(*(_fit(p_NV, g_N, ids_BT[rows], at + k, smoothing, head) for k in (0, 1, 2)))
    found.nats = (-_at(p_NV, ids_BT[rows, at + 1]).clamp_min(1e-300).log()).tolist()
    judged, fit = clear[1], torch.stack(fits).amin(0)
    best = torch.where(fits[1] <= FIT_MAX, 1, torch.stack(fits).argmin(0))
    found.n_judged = int(judged.sum())
    found.offsets = torch.where(fit <= FIT_MAX, best, -1)[judged].tolist()
    found.weights = torch.stack(weights).gather(0, best[None])[0][judged & (fit <= FIT_MAX)].tolist()
    return found


def _at(p_NV: Tensor, y_N: Tensor) -> Tensor:
    return p_NV.gather(1, y_N.long()[:, None])[:, 0]


def _fit(
    p_NV: Tensor, g_N: Tensor, ids_NT: Tensor, place_N: Tensor, smoothing: float, head: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(share of the gradient not explained, weight, whether a place tells anything) if the target is the token at `place_N`."""
    inside = place_N < ids_NT.shape[1]
    y_N = ids_NT.gather(1, place_N.clamp_max(ids_NT.shape[1] - 1)[:, None])[:, 0].long()
    d_NV = p_NV - smoothing / p_NV.shape[1]
    d_NV.scatter_add_(1, y_N[:, None], torch.full_like(d_NV[:, :1], smoothing - 1))
    d_N = d_NV if head is None else d_NV @ head
    weight = (g_N * d_N).sum(1) / d_N.square().sum(1).clamp_min(1e-30)
    left = (g_N - weight[:, None] * d_N).norm(dim=1) / g_N.norm(dim=1).clamp_min(1e-300)
    left = torch.where(inside & (weight > 0), left, torch.inf)
    return left, weight, inside & (1 - _at(p_NV, y_N) > CLEAR)

"""Diagnosis of a wrong attention kernel: known errors are computed in plain torch and
compared with its output.

B batch, T queries, S keys, N query heads, K key/value heads, H head_dim
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stackproof.trace.hooks import replaced
from stackproof.trace.points import Function
from stackproof.trace.scores import HIDDEN, Call, call_of

CLOSE = 0.01  # an error explains a kernel if it leaves at most this share of the difference
LARGEST = 2**24  # scores of one row held in memory; longer rows are not diagnosed


@dataclass(frozen=True)
class Kept:
    """One call of an attention function with its output."""

    call: Call
    v_BKSH: Tensor
    mixed_BNTH: Tensor


@contextmanager
def keeping(function: Function, number: int, kept: list[Kept]) -> Iterator[None]:
    """Append call number `number`, its first row only, to `kept` while the block runs."""
    module = importlib.import_module(function.module)
    original, count = getattr(module, function.name), 0

    def noted(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        nonlocal count
        mixed = original(q, k, v, *rest, **options)
        if count == number:
            call = call_of(function.name, q, k, rest, options)
            mask = None if call.mask is None else call.mask[:1]
            kept.append(
                Kept(replace(call, q_BNTH=q[:1], k_BKSH=k[:1], mask=mask), v[:1], mixed[:1])
            )
        count += 1
        return mixed

    with replaced(module, function.name, noted):
        yield


def known_error(kept: Kept) -> str:
    """The known error that reproduces the output of the kernel; empty if none does,
    or if the row is too long.
    """
    call = kept.call
    if call.q_BNTH.shape[1] * call.q_BNTH.shape[2] * call.k_BKSH.shape[2] > LARGEST:
        return ""
    wrong = kept.mixed_BNTH.double()
    apart = float((wrong - attend(kept)).norm())
    left = {
        text: float((wrong - tried(kept)).nan_to_num(torch.inf).norm())
        for text, tried in KNOWN_ERRORS.items()
    }
    best = min(left, key=left.__getitem__)
    return best if apart > 0 and left[best] <= CLOSE * apart else ""


def attend(
    kept: Kept, *, scale: float | None = None, visible: Tensor | None = None, tiled: bool = False
) -> Tensor:
    """softmax(scale·q·k)·v over visible keys in float64, (1, N, T, H);
    arguments override those of the call.
    """
    call = kept.call
    q, k, v = (x.double() for x in (call.q_BNTH, call.k_BKSH, kept.v_BKSH))
    many = q.shape[1] // k.shape[1]
    k, v = (x.repeat(1, many, 1, 1) if tiled else x.repeat_interleave(many, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (call.scale if scale is None else scale)
    visible = seen_of(call) if visible is None else visible
    if call.mask is not None and call.mask.dtype != torch.bool:
        scores = scores + call.mask.double().clamp(min=HIDDEN)  # an additive bias, as in ALiBi
    return scores.masked_fill(~visible, HIDDEN).softmax(-1) @ v


def seen_of(call: Call, later: int = 0) -> Tensor:
    """The visible keys of each query, (…, T, S) bool; `later` adds that many keys after its own."""
    T, S = call.q_BNTH.shape[2], call.k_BKSH.shape[2]
    index_S = torch.arange(S, device=call.q_BNTH.device)
    own_T1 = torch.arange(T, device=index_S.device)[:, None] + (
        call.offset if call.causal else S - T
    )
    earlier = index_S <= own_T1
    if call.mask is None:
        seen = earlier if call.causal else torch.ones_like(earlier)
    elif call.mask.is_floating_point():
        seen = call.mask > max(HIDDEN / 2, torch.finfo(call.mask.dtype).min / 2)
    else:
        seen = call.mask
    return seen | (~earlier & (index_S <= own_T1 + later))


def _causal(kept: Kept) -> Tensor:
    """Attention with the causal mask alone."""
    offset = kept.call.k_BKSH.shape[2] - kept.call.q_BNTH.shape[2]
    return attend(kept, visible=seen_of(replace(kept.call, mask=None, causal=True, offset=offset)))


KNOWN_ERRORS: dict[str, Callable[[Kept], Tensor]] = {
    "scores are not scaled": lambda kept: attend(kept, scale=1.0),
    "scores are scaled twice": lambda kept: attend(kept, scale=kept.call.scale**2),
    "scores are multiplied by what they should be divided by": lambda kept: attend(
        kept, scale=1 / kept.call.scale
    ),
    "each query sees the key after its own": lambda kept: attend(
        kept, visible=seen_of(kept.call, later=1)
    ),
    "each query sees all keys": lambda kept: attend(
        kept, visible=seen_of(kept.call, later=kept.call.k_BKSH.shape[2])
    ),
    "queries see all keys before them, whatever the mask says": _causal,
    "key heads are tiled where each should be repeated for its group": lambda kept: attend(
        kept, tiled=True
    ),
}

"""Ablation and activation patching: replace an activation and measure the loss.
B batch, T tokens, V vocab

A target is written `POINT[@POSITION]`: `layers.3.attention_out`, `layers.*.ffn.out`, or `layers.3`
for both branches of a block. Positions count from 0, negative ones from the end; `2:5` are three
positions, `*` is each position by itself.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.spec.errors import UsageError
from stackproof.trace.hooks import hook_points
from stackproof.trace.lens import divergence
from stackproof.trace.maps import map_of
from stackproof.trace.points import Point, sites
from stackproof.trace.trace import Names, run, values_at

BRANCHES = ("attention_out", "ffn.out")  # added to the residual stream by a block
Edit = Callable[[Point, Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """Points changed together, in execution order; `positions` are first and last (exclusive),
    None for all tokens.
    """

    text: str
    points: tuple[str, ...]
    positions: tuple[int, int] | None = None

    def within(self, n_tokens: int) -> slice:
        """The positions in a text of `n_tokens`. Raises UsageError if they are out of range."""
        if self.positions is None:
            return slice(None)
        first, last = (p + n_tokens if p < 0 else p for p in self.positions)
        last = n_tokens if self.positions[1] == 0 and self.positions[0] < 0 else last
        if not 0 <= first < last <= n_tokens:
            raise UsageError(
                f"{self.text}: the text has no such position",
                allowed=f"0 to {n_tokens - 1}, or -{n_tokens} to -1",
            )
        return slice(first, last)


@dataclass(frozen=True)
class Effect:
    """The effect of replacing one target.
    Losses are mean next-token losses, None for a single token.

    `kl_nats` is KL(before ‖ after), averaged over tokens. `restored_frac` of a patch is 1 −
    KL(source ‖ after) over KL(source ‖ before) at the last token. `top_before` and `top_after` are
    the most likely next token of the first row and its probability.
    """

    target: Target
    loss_nats: float | None
    delta_nats: float | None
    kl_nats: float
    top_before: tuple[int, float]
    top_after: tuple[int, float]
    restored_frac: float | None = None


def targets(
    model: nn.Module, texts: Iterable[str], n_tokens: int, where: Names = None
) -> list[Target]:
    """The targets in `texts`: one for each point or block that a pattern matches,
    and for each position of `@*`.

    Raises UsageError for unknown points, with the nearest ones, and for invalid positions.
    """
    return [t for text in texts for t in _expanded(model, text, n_tokens, where)]


def _expanded(model: nn.Module, text: str, n_tokens: int, where: Names) -> list[Target]:
    pattern, _, position = text.partition("@")
    names = map_of(model, where)
    known = [s.point for s in sites(model, names)]
    whole = bool(re.fullmatch(r"layers\.[^.]+", pattern))
    blocks = sorted({p.layer for p in known if whole and p.layer is not None})
    groups = {
        f"layers.{i}": tuple(p.name for p in known if p.layer == i and p.slot in BRANCHES)
        for i in blocks
        if fnmatch.fnmatchcase(f"layers.{i}", pattern)
    } or {s.point.name: (s.point.name,) for s in sites(model, names, [pattern])}
    if position == "*":
        places = [(f"@{i}", (i, i + 1)) for i in range(n_tokens)]
    else:
        places = [_positions(text, position)]
    made = [
        Target(name + suffix, points, at)
        for name, points in groups.items()
        for suffix, at in places
    ]
    for target in made:
        target.within(n_tokens)
    return made


def _positions(text: str, position: str) -> tuple[str, tuple[int, int] | None]:
    if not position and "@" not in text:
        return "", None
    if not (found := re.fullmatch(r"(-?\d+)(?::(-?\d+))?", position)):
        raise UsageError(
            f"{text} has an invalid position",
            value=position,
            allowed="a number, first:last (exclusive), or *",
        )
    first = int(found[1])
    return f"@{position}", (first, first + 1 if found[2] is None else int(found[2]))


# ---- edits


def zeroed(target: Target, n_tokens: int | None) -> Edit:
    """Zeros at the target; if `n_tokens` is None, in forwards of any length, for sampling."""
    return lambda point, x: _put(
        target, x, n_tokens, torch.zeros((), dtype=x.dtype, device=x.device)
    )


def averaged(target: Target, n_tokens: int | None, means: Mapping[str, Tensor]) -> Edit:
    """The mean of each feature at the target, from `means_of`."""
    return lambda point, x: _put(target, x, n_tokens, means[point.name].to(x.dtype))


def patched(target: Target, n_tokens: int, held: Mapping[str, Tensor], n_source: int) -> Edit:
    """The values of another run, from `values_of`, at the same positions;
    negative ones count from the end of each text.
    """
    return lambda point, x: _put(target, x, n_tokens, held[point.name][:, target.within(n_source)])


def _put(target: Target, x: Tensor, n_tokens: int | None, new: Tensor) -> Tensor:
    """`x` with `new` at the positions of the target."""
    if target.positions is not None and (n_tokens is None or x.shape[1] != n_tokens):
        raise UsageError(
            f"{target.text}: this point has no value for each position of the text",
            value=f"shape {tuple(x.shape)}",
            next_step=(
                "leave out the position: experts hold the tokens routed to them, and the length "
                "of a sample is not known yet"
            ),
        )
    at = target.within(x.shape[1])
    there = x[:, at]
    if new.ndim >= there.ndim and new.shape[1:] != there.shape[1:]:
        raise UsageError(
            f"{target.text}: the two texts have different lengths",
            value=f"{tuple(new.shape)} for {tuple(there.shape)}",
            next_step="name a position",
        )
    changed = x.clone()
    changed[:, at] = new.expand_as(there)
    return changed


def values_of(
    model: nn.Module, input_ids_BT: Tensor, chosen: Iterable[Target], where: Names = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The values at the points of the targets during one forward, and the logits."""
    return values_at(
        model, input_ids_BT, sorted({name for target in chosen for name in target.points}), where
    )


def means_of(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean over batch and tokens of each feature of each point, in the dtype of the point."""
    return {name: x.double().mean((0, 1)).to(x.dtype) for name, x in held.items()}


def edited(
    model: nn.Module, target: Target, edit: Edit, where: Names = None
) -> AbstractContextManager:
    """Context manager: the model with the target replaced."""
    return hook_points(model, target.points, edit, where=where)


# ---- effects


@torch.no_grad()
def ablate(
    model: nn.Module,
    input_ids_BT: Tensor,
    chosen: Sequence[Target],
    *,
    by: Literal["zero", "mean"] = "zero",
    source_ids_BT: Tensor | None = None,
    where: Names = None,
) -> list[Effect]:
    """The effect of replacing each target by zeros, or by its mean over `source_ids_BT` (default:
    over the text itself).
    """
    n, means = input_ids_BT.shape[1], {}
    if by == "mean":
        texts_BT = input_ids_BT if source_ids_BT is None else source_ids_BT
        means = means_of(values_of(model, texts_BT, chosen, where)[0])
    edits = [averaged(t, n, means) if by == "mean" else zeroed(t, n) for t in chosen]
    return _effects(model, input_ids_BT, chosen, edits, where)


@torch.no_grad()
def patch(
    model: nn.Module,
    input_ids_BT: Tensor,
    source_ids_BT: Tensor,
    chosen: Sequence[Target],
    *,
    where: Names = None,
) -> list[Effect]:
    """The effect of replacing each target by its value in a run of another text.

    Raises UsageError if the texts differ in length and a target has no position.
    """
    n, n_source = input_ids_BT.shape[1], source_ids_BT.shape[1]
    held, source = values_of(model, source_ids_BT, chosen, where)
    edits = [patched(t, n, held, n_source) for t in chosen]
    return _effects(model, input_ids_BT, chosen, edits, where, source)


def _effects(
    model: nn.Module,
    input_ids_BT: Tensor,
    chosen: Sequence[Target],
    edits: Sequence[Edit],
    where: Names,
    source_BTV: Tensor | None = None,
) -> list[Effect]:
    """The effect of each edit at its target."""
    clean_BTV, found = run(model, input_ids_BT), []
    for target, edit in zip(chosen, edits):
        with edited(model, target, edit, where):
            after_BTV = run(model, input_ids_BT)
        found.append(_effect(target, input_ids_BT, clean_BTV, after_BTV, source_BTV))
    return found


def _effect(
    target: Target,
    input_ids_BT: Tensor,
    before_BTV: Tensor,
    after_BTV: Tensor,
    source_BTV: Tensor | None = None,
) -> Effect:
    labels = input_ids_BT[:, 1:]
    losses = [
        F.cross_entropy(x[:, :-1].float().flatten(0, 1), labels.flatten()).item()
        for x in (before_BTV, after_BTV)
        if labels.numel()
    ]
    log_before, log_after = (x.float().log_softmax(-1) for x in (before_BTV, after_BTV))
    restored = None
    if source_BTV is not None:
        log_source = source_BTV[:, -1:].float().log_softmax(-1)
        apart, left = (float(divergence(log_source, x[:, -1:])) for x in (log_before, log_after))
        restored = 1 - left / apart if apart > 0 else None
    return Effect(
        target=target,
        loss_nats=losses[1] if losses else None,
        delta_nats=losses[1] - losses[0] if losses else None,
        kl_nats=float(divergence(log_before, log_after)),
        top_before=_top(log_before),
        top_after=_top(log_after),
        restored_frac=restored,
    )


def _top(log_probs_BTV: Tensor) -> tuple[int, float]:
    value, index = log_probs_BTV[0, -1].max(-1)
    return int(index), float(value.exp())

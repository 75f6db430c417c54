"""Gates of any causal language model, from outside.

B batch, T tokens, V vocab
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from stackproof.contracts.gate import Verdict, decide, decides, failed, not_run
from stackproof.contracts.subject import Model, Subject

LENGTHS = (3, 17, 64)
LONGEST = 512


def drawn(rows: int, length: int, vocab_size: int) -> Tensor:
    """Ids (rows, length), the same in every call; no global random state is used."""
    return torch.randint(
        0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(rows * 1000 + length)
    )


def _lengths(max_length: int) -> list[int]:
    """Short ones, and the longest a model takes where that is not far beyond them."""
    longest = [max_length] if 0 < max_length <= LONGEST else []
    return sorted(
        {n for n in (*LENGTHS, *longest) if n >= 2 and (not max_length or n <= max_length)}
    )


def _other(ids_BT: Tensor, where_BT: Tensor, vocab_size: int) -> Tensor:
    return torch.where(where_BT, (ids_BT + 1 + ids_BT % 7) % vocab_size, ids_BT)


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value of `a`; infinity where one is
    NaN and the other is not.
    """
    if not a.numel():
        return 0.0
    a, b = a.double(), b.double()
    both = a.isnan() & b.isnan() | (a == b)
    gap = torch.where(both, 0.0, (a - b).abs())
    scale = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 1.0
    worst = float(gap.max()) / max(scale, 1e-12)
    return worst if worst == worst else float("inf")


@decides("model.future-blind")
@torch.no_grad()
def future_blind(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Changing tokens from a position on changes no logit before it, with and without a mask, in
    both modes; labels change none at all.
    """
    model = subject.model
    worst, where, deaf = 0.0, "", 0
    for training in (False, True):
        with model.training(training):
            for length in _lengths(model.max_length):
                ids = drawn(2, length, model.vocab_size)
                for mask in (None, torch.ones_like(ids)) if model.takes_mask else (None,):
                    before = model.logits(ids, mask)
                    for position in sorted({1, length // 2, length - 1}):
                        late = (torch.arange(length) >= position).expand(2, length)
                        after = model.logits(_other(ids, late, model.vocab_size), mask)
                        gap = _gap(before[:, :position], after[:, :position])
                        deaf += bool(torch.equal(before[:, position:], after[:, position:]))
                        if gap > worst:
                            worst, where = (
                                gap,
                                (
                                    f"position {position} of {length}, "
                                    f"{'training' if training else 'evaluation'} mode"
                                ),
                            )
    if deaf:
        return failed(
            "changing a token does not change its own logits, so this check sees nothing", deaf=deaf
        )
    labels_gap = _labels_gap(model)
    ok = worst <= limits.leak_rel_max and labels_gap <= limits.leak_rel_max
    text = (
        f"earlier logits see a later token ({where})"
        if worst > limits.leak_rel_max
        else "the labels change the logits"
    )
    return decide(ok, text, leak_rel=worst, labels_leak_rel=labels_gap)


def _labels_gap(model: Model) -> float:
    """How far logits move when nothing but the labels changes; 0 where the model takes none."""
    if not model.takes_labels:
        return 0.0
    ids = drawn(2, _lengths(model.max_length)[-1], model.vocab_size)
    other = _other(ids, torch.ones_like(ids, dtype=torch.bool), model.vocab_size)
    first = model.logits(ids, None, ids)
    return max(_gap(first, model.logits(ids, None, other)), _gap(first, model.logits(ids)))


@decides("model.padding-blind")
@torch.no_grad()
def padding_blind(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Tokens under a mask of 0 change no logit of others, left or right of them, and more padding
    on the right changes none either.
    """
    model = subject.model
    if not model.takes_mask:
        return not_run("the model takes no attention mask")
    length = max(_lengths(model.max_length)[:-1] or [2])
    ids, found = drawn(3, length, model.vocab_size), {}
    for side in ("right", "left"):
        for training in (False, True):
            with model.training(training):
                mask = _ragged(3, length, side)
                before = model.logits(ids, mask)
                after = model.logits(_other(ids, mask == 0, model.vocab_size), mask)
                found[f"ids under {side} padding"] = max(
                    found.get(f"ids under {side} padding", 0.0),
                    _gap(before[mask > 0], after[mask > 0]),
                )
    with model.training(False):
        mask = _ragged(3, length, "right")
        more = [torch.cat([t, torch.zeros_like(t[:, :2])], 1) for t in (ids, mask)]
        if not model.max_length or length + 2 <= model.max_length:
            found["more padding"] = _gap(
                model.logits(ids, mask)[mask > 0], model.logits(*more)[:, :length][mask > 0]
            )
    worst = max(found, key=found.get)
    limit = {
        name: limits.longer_rel_max if name == "more padding" else limits.leak_rel_max
        for name in found
    }
    ok = all(found[name] <= limit[name] for name in found)
    return decide(
        ok, f"logits of real tokens change with {worst}", leak_rel=found[worst], worst=worst
    )


def _ragged(rows: int, length: int, side: str) -> Tensor:
    """A mask (rows, length) with 0, 1 and length // 2 places of padding."""
    pads = torch.tensor([0, 1, length // 2])[:rows, None]
    places = torch.arange(length)[None]
    return (places >= pads if side == "left" else places < length - pads).long()


@decides("model.tied-head")
def tied_head(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Embedding and head are one tensor exactly where the configuration declares it."""
    tied_declared = subject.declared.tied_head
    embedding_weight, head_weight = subject.model.embedding.weight, subject.model.head_weight
    same = embedding_weight is head_weight or embedding_weight.data_ptr() == head_weight.data_ptr()
    text = (
        "the configuration ties embedding and head, and they are two tensors"
        if tied_declared
        else "embedding and head are one tensor"
    )
    return decide(same == tied_declared, text, tied=same, declared=tied_declared)

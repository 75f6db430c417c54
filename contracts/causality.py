"""Gates of what a token depends on: earlier tokens of its own document and row, and nothing else.

B batch, T tokens, V vocab
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from stackproof.contracts.declared import chooses, hard_capacity
from stackproof.contracts.gate import Verdict, decide, decides, failed, not_run
from stackproof.contracts.model import draw_ids
from stackproof.contracts.oracle import documents
from stackproof.contracts.subject import Model, Subject, offered, offers

LENGTHS = (2, 17, 64, 65, 129, 2048)  # around the tile sizes of fused kernels
SHORT_LENGTHS, LONGEST = (3, 17, 64), 512  # where logits are compared to rounding only
PACKED_LENGTHS = (17, 129)
GRADIENT_TOKENS = 512  # of a row whose gradients are compared


# --- how two forwards are compared ----------------------------------------------------------------


def _bitwise(subject: Subject) -> bool:
    """Whether an architecture is declared: then only the tokens that a logit may depend on change a
    bit of it. An undeclared model may compute a row as a whole, as a convolution by Fourier
    transforms does, and is compared to rounding.
    """
    return offered(lambda: subject.declared.architecture) is not None


def _routed(subject: Subject) -> bool:
    """Whether declared routers choose experts or tokens. Content then decides which tokens are
    computed together.
    """
    return _bitwise(subject) and chooses(subject.declared.architecture)


@contextmanager
def _wide_if_routed(subject: Subject) -> Iterator[None]:
    """The model in float64 where routers choose, so that rounding does not tip a choice. Its
    tensors get back the memory that they had.
    """
    if not _routed(subject):
        yield
        return
    model = subject.model.module
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    kept = [t.data for t in tensors]
    for t in tensors:
        t.data = t.data.double()
    try:
        yield
    finally:
        for t, data in zip(tensors, kept, strict=True):
            t.data = data


@contextmanager
def _mode(subject: Subject, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode. Blocks that read only some tokens never draw the
    same masks twice, so dropout is off there.
    """
    with subject.model.training(training):
        if _routed(subject) and hard_capacity(subject.declared.architecture):
            for module in subject.model.module.modules():
                module.training &= not isinstance(module, nn.Dropout)
        yield


def _lengths(subject: Subject) -> list[int]:
    """Lengths around tile sizes up to the longest row where equality is bitwise. Elsewhere short
    ones, and the longest row if it is not far beyond them.
    """
    longest = subject.model.max_length
    if _bitwise(subject):
        return sorted({min(n, longest) for n in LENGTHS})
    lengths = {*SHORT_LENGTHS, *((longest,) if longest <= LONGEST else ())}
    return sorted(n for n in lengths if n >= 2 and (not longest or n <= longest))


def _other(ids_BT: Tensor, where_BT: Tensor, vocab_size: int) -> Tensor:
    """Other ids at the places where `where_BT` is true."""
    return torch.where(where_BT, (ids_BT + 1) % vocab_size, ids_BT)


def difference(before: Tensor, after: Tensor, *, relative: bool) -> float:
    """Largest difference of two tensors, if `relative` over the largest finite size in `before`.
    NaN equals NaN, and an infinity itself; the difference of either to anything else is infinite.
    """
    if torch.equal(before, after):
        return 0.0
    same = (before == after) | (before.isnan() & after.isnan())
    gaps = torch.where(same, 0.0, (before - after).abs())
    gap = float(torch.where(gaps.isnan(), torch.inf, gaps).max())
    return gap / _scale(before) if relative else gap


def _scale(logits: Tensor) -> float:
    """The largest finite size in a tensor."""
    return max(float(torch.where(logits.isfinite(), logits, 0.0).abs().max()), 1e-12)


@dataclass
class _Effects:
    """By cause: the largest change of logits that had to stay, and where it was. Infinite for
    logits that are not finite.
    """

    relative: bool
    largest: dict[str, float] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)

    def compare(self, cause: str, before: Tensor, after: Tensor, where: str = "") -> None:
        """Keep the difference of two tensors if it is the largest so far."""
        found = 0.0
        if before.numel():
            finite = bool(before.isfinite().all() and after.isfinite().all())
            found = difference(before, after, relative=self.relative) if finite else torch.inf
        if found > self.largest.setdefault(cause, 0.0):
            self.largest[cause], self.where[cause] = found, where

    def judged(self, text: Mapping[str, str], allowed: Mapping[str, float]) -> Verdict:
        """Each change against its limit; `text` is the message by cause."""
        wrong = [text[cause] for cause, found in self.largest.items() if found > allowed[cause]]
        unit = "rel" if self.relative else "abs"
        measured = {f"{cause}_{unit}": found for cause, found in self.largest.items()}
        return decide(not wrong, "; ".join(wrong), **measured)


def _leak_max(limits: SimpleNamespace, subject: Subject) -> float:
    """How far logits may move that have to stay."""
    if not _bitwise(subject):
        return limits.leak_rel_max
    return limits.regrouped_abs_max if _routed(subject) else limits.leak_abs_max


# --- causality ------------------------------------------------------------------------------------


@decides("model.causal")
@torch.no_grad()
def causal(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Changing tokens from a position on changes no logit before it, changing a row changes no
    other row, and changing labels changes no logit; in both modes, with and without a mask.

    In training mode both forwards draw the same dropout masks. Bit for bit where an architecture is
    declared, in float64 where its routers choose, and relative to the largest logit elsewhere. In
    the run's own precision, where rounding may tip a choice, the loss of earlier tokens has no
    gradient at the embeddings of later ones, nor that of a row at another.
    """
    model, deaf = subject.model, 0
    effects = _Effects(relative=not _bitwise(subject))
    with _wide_if_routed(subject):
        for training in (False, True):
            with _mode(subject, training):
                mode = "training mode" if training else "evaluation mode"
                deaf += sum(_future(model, n, effects, mode) for n in _lengths(subject))
                if model.takes_labels:
                    _labels(model, _lengths(subject)[-1], effects)
    gradient, unlearned = _later_gradients(model) if offers(model.packed_logits) else (0.0, 0)
    if deaf or unlearned:
        return failed(
            "changing a token does not change its own logits, so this check sees nothing",
            deaf=deaf,
            unlearned=unlearned,
        )
    text = {
        "gradient": "in the precision of the run, the loss of earlier tokens has a gradient at "
        "later tokens or at other rows",
        "leak": f"earlier logits see a later token ({effects.where.get('leak', '')})",
        "row": f"one row of a batch sees another ({effects.where.get('row', '')})",
        "labels_leak": "the labels change the logits",
    }
    allowed = dict.fromkeys(text, _leak_max(limits, subject))
    effects.largest["gradient"] = gradient
    return effects.judged(text, allowed | {"gradient": limits.gradient_abs_max})


def _future(model: Model, length: int, effects: _Effects, mode: str) -> int:
    """Compare logits before changed tokens, and of unchanged rows. Returns at how many positions a
    changed token left its own logits as they were.
    """
    deaf, index_T = 0, torch.arange(length)
    ids = draw_ids((2, length), model.vocab_size, seed=length)
    for mask in (None, torch.ones_like(ids)) if model.takes_mask else (None,):
        before = model.logits(ids, mask)
        for position in sorted({1, length // 2, length - 1}):
            late = (index_T >= position).expand(2, length)
            after = model.logits(_other(ids, late, model.vocab_size), mask)
            where = f"position {position} of {length}, {mode}"
            effects.compare("leak", before[:, :position], after[:, :position], where)
            deaf += bool(torch.equal(before[:, position], after[:, position]))
        first = torch.tensor([[True], [False]]).expand(2, length)
        after = model.logits(_other(ids, first, model.vocab_size), mask)
        effects.compare("row", before[1:], after[1:], f"{length} tokens, {mode}")
    return deaf


@torch.enable_grad()
def _later_gradients(model: Model) -> tuple[float, int]:
    """(largest gradient of the loss before a position, in the first row, at the embeddings of later
    tokens and of the other row; positions without one at their own), in training mode and in the
    precision of the run.
    """
    length = min(n for n in (model.max_length, GRADIENT_TOKENS) if n)
    ids, leaves = draw_ids((2, length), model.vocab_size, seed=length), []
    with model.training(True), model.precision(), _leaf_at(model.embedding, leaves):
        loss_T = model.packed_logits(ids, torch.zeros_like(ids))[0].log_softmax(-1)[:, 0]
    foreign, unlearned = 0.0, 0
    for position in sorted({1, length // 2, length - 1}):
        (gradient_BTD,) = torch.autograd.grad(
            loss_T[:position].sum(), leaves, retain_graph=True, materialize_grads=True
        )
        unlearned += not bool(gradient_BTD[0, :position].any(-1).all())
        gradient_BTD[0, :position] = 0
        foreign = max(foreign, float(gradient_BTD.abs().max()))
    return foreign, unlearned


@contextmanager
def _leaf_at(embedding: nn.Module, leaves: list[Tensor]) -> Iterator[None]:
    """Make the output of the embedding a leaf, appended to `leaves`, until the block ends."""
    hook = embedding.register_forward_hook(
        lambda _, __, x_BTD: leaves.append(x_BTD.detach().requires_grad_()) or leaves[-1]
    )
    try:
        yield
    finally:
        hook.remove()


def _labels(model: Model, length: int, effects: _Effects) -> None:
    """Compare logits with these labels, with others and without any."""
    ids = draw_ids((2, length), model.vocab_size, seed=length)
    before = model.logits(ids, None, ids)
    effects.compare("labels_leak", before, model.logits(ids, None, (ids + 1) % model.vocab_size))
    effects.compare("labels_leak", before, model.logits(ids))


# --- isolation ------------------------------------------------------------------------------------


@decides("model.isolation")
def isolation(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Other documents of a packed row, and padding, change no logit of a token and receive no
    gradient from it.

    Packed documents are judged where the trainer takes them, padding where it takes an attention
    mask; `judged` names what was.
    """
    halves = {}
    if offers(subject.model.packed_logits):
        halves["documents"] = _documents_apart(limits, subject)
    if subject.model.takes_mask:
        halves["padding"] = _padding_unread(limits, subject)
    if not halves:
        return not_run("the model takes no attention mask and no packed documents")
    return decide(
        all(half.passed for half in halves.values()),
        "; ".join(half.message for half in halves.values() if half.message),
        judged=" and ".join(halves),
        **{name: value for half in halves.values() for name, value in half.measured.items()},
    )


def _documents_apart(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Documents packed into a row have the logits they have alone, and neither logits nor gradients
    pass between them. Logits without dropout, where routers choose in float64, as in `causal`;
    gradients in the mode and precision of the run.
    """
    model, found, bitwise = subject.model, [], _bitwise(subject)
    for length in sorted({min(n, model.max_length or n) for n in PACKED_LENGTHS}):
        packed = packing(length)
        ids = draw_ids((2, length), model.vocab_size, seed=length)
        ids[1, packed[1] == packed[1, -1]] = 0
        with model.training(False), _wide_if_routed(subject):
            error, leak, blind = _logits_between(model, ids, packed, relative=not bitwise)
        # In training, where blocks may be computed again for the backward.
        with _mode(subject, training=True):
            found.append((error, leak, blind, *_gradients_between(model, ids, packed)))
    rel_error, leak, deaf, gradient, unlearned = (
        torch.tensor(found, dtype=torch.float64).amax(0).tolist()
    )
    if deaf or unlearned:
        return failed(
            "a document's tokens do not move its own logits, so this check sees nothing",
            deaf=deaf,
            unlearned=unlearned,
        )
    ok = (
        rel_error <= limits.rel_error_max
        and leak <= _leak_max(limits, subject)
        and gradient <= limits.gradient_abs_max
    )
    text = (
        "packed documents are not kept apart (logits against those alone, effect on neighbours, "
        "or gradient at their tokens)"
    )
    unit = "abs" if bitwise else "rel"
    return decide(
        ok, text, **{"rel_error": rel_error, f"leak_{unit}": leak, "gradient_abs": gradient}
    )


def packing(length: int) -> Tensor:
    """Document ids (2, T): row 0 begins with a document of one token and is full; row 1 has one
    inside and ends in padding.
    """
    cuts = ((1, length // 3), (length // 4, length // 4 + 1, 7 * length // 8))
    return torch.tensor([[sum(cut <= t for cut in row) for t in range(length)] for row in cuts])


def _each_document(documents_BT: Tensor) -> list[tuple[int, Tensor]]:
    """Row and places (T,) bool of every document."""
    index_T = torch.arange(documents_BT.shape[1])
    return [
        (row, (index_T >= own.start) & (index_T < own.stop))
        for row, own in documents(documents_BT.shape, documents_BT)
    ]


@torch.no_grad()
def _logits_between(
    model: Model, ids_BT: Tensor, documents_BT: Tensor, *, relative: bool
) -> tuple[float, float, int]:
    """(worst relative error of a token's logits against those alone, largest effect on other
    documents, documents without effect on their own).
    """
    packed, errors, leaks, deaf = model.packed_logits(ids_BT, documents_BT), [], [], 0
    for row, own_T in _each_document(documents_BT):
        alone = model.logits(ids_BT[row, own_T][None])[0].double()
        errors.append(((packed[row, own_T] - alone).norm(dim=-1) / alone.norm(dim=-1)).max())
        other = ids_BT.clone()
        other[row, own_T] = (other[row, own_T] + 1) % model.vocab_size
        moved_BT = (model.packed_logits(other, documents_BT) - packed).abs().amax(-1)
        deaf += not bool(moved_BT[row, own_T].all())
        moved_BT[row, own_T] = 0
        leaks.append(moved_BT.max())
    leak = float(torch.stack(leaks).max())
    leak = leak / _scale(packed) if relative else leak
    return float(torch.stack(errors).max()), leak, deaf


def _gradients_between(model: Model, ids_BT: Tensor, documents_BT: Tensor) -> tuple[float, int]:
    """(largest gradient of a document's loss at the embeddings of other documents, documents
    without one at their own).
    """
    leaves: list[Tensor] = []
    with model.precision(), _leaf_at(model.embedding, leaves):
        loss_BT = model.packed_logits(ids_BT, documents_BT).log_softmax(-1)[..., 0]
    foreign, unlearned = [], 0
    for row, own_T in _each_document(documents_BT):
        (gradient_BTD,) = torch.autograd.grad(
            loss_BT[row, own_T].sum(), leaves, retain_graph=True, materialize_grads=True
        )
        unlearned += not bool(gradient_BTD[row, own_T].any(-1).all())
        gradient_BTD[row, own_T] = 0
        foreign.append(gradient_BTD.abs().max())
    return float(torch.stack(foreign).max()), unlearned


@torch.no_grad()
def _padding_unread(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Tokens under a mask of 0 change no logit of others, left or right of them, and more padding
    on the right changes none either.
    """
    model, effects = subject.model, _Effects(relative=True)
    length = max(_lengths(subject)[:-1] or [2])
    ids = draw_ids((3, length), model.vocab_size, seed=length)
    for side in ("right", "left"):
        mask = _ragged(3, length, side)
        for training in (False, True):
            with model.training(training):
                before = model.logits(ids, mask)
                after = model.logits(_other(ids, mask == 0, model.vocab_size), mask)
                effects.compare("padding", before[mask > 0], after[mask > 0], side)
                moved = model.logits(_other(ids, mask > 0, model.vocab_size), mask)
                if torch.equal(before[mask > 0], moved[mask > 0]):
                    text = "changing tokens does not change their logits: this check sees nothing"
                    return failed(text, deaf=1)
    if not model.max_length or length + 2 <= model.max_length:
        with model.training(False):
            mask = _ragged(3, length, "right")
            longer = [torch.cat([t, torch.zeros_like(t[:, :2])], 1) for t in (ids, mask)]
            before, after = model.logits(ids, mask), model.logits(*longer)[:, :length]
            effects.compare("longer", before[mask > 0], after[mask > 0])
    side_of = effects.where.get("padding", "")
    text = {
        "padding": f"logits of real tokens change with ids under {side_of} padding",
        "longer": "logits of real tokens change with more padding on the right",
    }
    return effects.judged(text, {"padding": limits.leak_rel_max, "longer": limits.longer_rel_max})


def _ragged(rows: int, length: int, side: str) -> Tensor:
    """A mask (rows, length) with 0, 1 and length // 2 places of padding."""
    pads = torch.tensor([0, 1, length // 2])[:rows, None]
    places = torch.arange(length)[None]
    return (places >= pads if side == "left" else places < length - pads).long()

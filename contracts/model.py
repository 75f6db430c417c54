"""Gates of the model: the first loss, causality, packed documents, training against evaluation
mode, and learning one batch.

B batch, T tokens, D d_model, J rotated pairs of a head, V vocab
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.declared import chooses, hard_capacity
from stackproof.contracts.gate import Verdict, decide, decides, failed
from stackproof.contracts.oracle import documents, rotary_angles

IGNORE = -100
LENGTHS = (2, 17, 64, 65, 129, 2048)
PACKED_LENGTHS = (17, 129)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _draw_ids(shape: tuple[int, ...], vocab_size: int, seed: int) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# --- before the first update ----------------------------------------------------------------------


def table_error(tables: tuple[Tensor, Tensor] | None, a: Mapping[str, Any]) -> float:
    """Largest difference of cosine and sine (max_seq_len, J) from the definition; infinite where
    tables are missing or not wanted.
    """
    if tables is None or a["positions"]["kind"] != "rotary":
        return 0.0 if tables is None and a["positions"]["kind"] != "rotary" else math.inf
    angle_TJ = rotary_angles(a, torch.arange(a["max_seq_len"]))
    pairs = list(zip(tables, (angle_TJ.cos(), angle_TJ.sin())))
    return max(
        float((got.double().cpu() - b).abs().max()) if got.shape == b.shape else math.inf
        for got, b in pairs
    )


def _mean_nats(logits_BTV: Tensor, labels_BT: Tensor) -> float:
    """Mean −log p of the labels that are not −100, in float64."""
    chosen = labels_BT != IGNORE
    log_p = logits_BTV.double().log_softmax(-1)[chosen]
    return -float(log_p.gather(1, labels_BT[chosen][:, None]).mean())


def in_eval(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Logits with dropout off; the modes of all modules are put back."""
    with _modes_kept(model):
        return model.eval()(ids_BT)


# --- causality ------------------------------------------------------------------------------------


@decides("model.causality")
@torch.no_grad()
def causality(
    limits: SimpleNamespace,
    *,
    model: nn.Module,
    declared_architecture: Mapping[str, Any],
    vocab_size: int,
    max_seq_len: int,
) -> Verdict:
    """Changing one token changes no logit before it, and changing one row changes no other, bit for
    bit; in eval and in train mode.

    Lengths lie around the tile sizes of fused kernels. In train mode both forwards draw the same
    dropout masks. Where routers choose, the model is judged in float64: content decides which
    tokens are computed together, and rounding must not tip a choice.
    """
    a, worst_leak, worst_row, deaf, where = declared_architecture, 0.0, 0.0, 0, ""
    with _modes_kept(model), _wide_enough(model, a):
        for training in (False, True):
            _set_mode(model, a, training)
            for length in sorted({min(n, max_seq_len) for n in LENGTHS}):
                ids = _draw_ids((2, length), vocab_size, seed=length).to(device_of(model))
                before = _same_dropout(model, ids)
                for position in sorted({1, length // 2, length - 1}):
                    after = _same_dropout(model, _with_other_token(ids, position, vocab_size))
                    leak = float((after - before)[:, :position].abs().max())
                    deaf += bool(torch.equal(after[:, position], before[:, position]))
                    if leak > worst_leak:
                        worst_leak, where = (
                            leak,
                            (
                                f"position {position} of {length}, "
                                f"{'train' if training else 'eval'} mode"
                            ),
                        )
                worst_row = max(worst_row, _row_effect(model, ids, before, vocab_size))
    if deaf:
        return failed(
            "changing a token does not change its own logits, so this check sees nothing", deaf=deaf
        )
    leak_max, row_max = (
        (limits.regrouped_abs_max,) * 2 if chooses(a) else (limits.leak_abs_max, limits.row_abs_max)
    )
    ok = worst_leak <= leak_max and worst_row <= row_max
    text = (
        f"earlier logits see a later token ({where})"
        if worst_leak > leak_max
        else "one row of a batch sees another"
    )
    return decide(ok, text, leak_abs=worst_leak, row_abs=worst_row)


def _row_effect(model: nn.Module, ids_BT: Tensor, before_BTV: Tensor, vocab_size: int) -> float:
    """Largest change of the other rows' logits when the first row changes."""
    rows = ids_BT.clone()
    rows[0] = (rows[0] + 1) % vocab_size
    return float((_same_dropout(model, rows) - before_BTV)[1:].abs().max())


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Training or evaluation mode of every module is as before afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _wide_enough(model: nn.Module, a: Mapping[str, Any]) -> Iterator[None]:
    """The model in float64 where routers choose; there and back no float32 weight changes."""
    dtype = next(model.parameters()).dtype
    if chooses(a):
        model.double()
    try:
        yield
    finally:
        model.to(dtype)


def _set_mode(model: nn.Module, a: Mapping[str, Any], training: bool) -> None:
    """Mode of the whole model; blocks that read some tokens only never draw the same masks twice,
    so dropout is off there.
    """
    model.train(training)
    if hard_capacity(a):
        for module in model.modules():
            module.training &= not isinstance(module, nn.Dropout)


def _same_dropout(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Logits with the same random numbers in every call; the caller's random state is untouched."""
    with torch.random.fork_rng(devices=[ids_BT.device] if ids_BT.is_cuda else []):
        torch.manual_seed(0)
        return model(ids_BT)


def _with_other_token(ids_BT: Tensor, position: int, vocab_size: int) -> Tensor:
    other = ids_BT.clone()
    other[:, position] = (other[:, position] + 1) % vocab_size
    return other


# --- packed documents -----------------------------------------------------------------------------


@decides("model.document-isolation")
def document_isolation(
    limits: SimpleNamespace,
    *,
    model: nn.Module,
    packed_logits: Callable[[Tensor, Tensor], Tensor],
    embedding: nn.Module,
    declared_architecture: Mapping[str, Any],
    vocab_size: int,
    max_seq_len: int,
) -> Verdict:
    """Documents packed into a row have the logits they have alone, and neither logits nor gradients
    pass between them; dropout is off.

    `packed_logits(input_ids_BT, document_ids_BT)` runs `model` on packed rows; `embedding` is its
    module that looks up tokens. Where routers choose, the model is judged in float64, as in
    `causality`.
    """
    found = []
    with _modes_kept(model), _wide_enough(model, declared_architecture):
        model.eval()
        for length in sorted({min(n, max_seq_len) for n in PACKED_LENGTHS}):
            packed = packing(length).to(device_of(model))
            ids = _draw_ids((2, length), vocab_size, seed=length).to(device_of(model))
            ids[1, packed[1] == packed[1, -1]] = 0
            logits = _logits_between(model, packed_logits, ids, packed, vocab_size)
            found.append((*logits, *_gradients_between(packed_logits, embedding, ids, packed)))
    rel_error, leak, deaf, gradient, unlearned = (
        torch.tensor(found, dtype=torch.float64).amax(0).tolist()
    )
    if deaf or unlearned:
        return failed(
            "a document's tokens do not move its own logits, so this check sees nothing",
            deaf=deaf,
            unlearned=unlearned,
        )
    leak_max = limits.regrouped_abs_max if chooses(declared_architecture) else limits.leak_abs_max
    ok = (
        rel_error <= limits.rel_error_max
        and leak <= leak_max
        and gradient <= limits.gradient_abs_max
    )
    text = (
        "packed documents are not kept apart (logits against those alone, effect on neighbours, "
        "or gradient at their tokens)"
    )
    return decide(ok, text, rel_error=rel_error, leak_abs=leak, gradient_abs=gradient)


def packing(length: int) -> Tensor:
    """Document ids (2, T): row 0 begins with a document of one token and is full; row 1 has one
    inside and ends in padding.
    """
    cuts = ((1, length // 3), (length // 4, length // 4 + 1, 7 * length // 8))
    return torch.tensor([[sum(cut <= t for cut in row) for t in range(length)] for row in cuts])


def _each_document(documents_BT: Tensor) -> list[tuple[int, Tensor]]:
    """Row and places (T,) bool of every document."""
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    return [
        (row, (index_T >= own.start) & (index_T < own.stop))
        for row, own in documents(documents_BT.shape, documents_BT)
    ]


@torch.no_grad()
def _logits_between(
    model: nn.Module, packed_logits: Callable, ids_BT: Tensor, documents_BT: Tensor, vocab_size: int
) -> tuple[float, float, int]:
    """(worst relative error of a token's logits against those alone, largest effect on other
    documents, documents without effect).
    """
    packed, errors, leaks, deaf = packed_logits(ids_BT, documents_BT), [], [], 0
    for row, own_T in _each_document(documents_BT):
        alone = model(ids_BT[row, own_T][None])[0].double()
        errors.append(((packed[row, own_T] - alone).norm(dim=-1) / alone.norm(dim=-1)).max())
        other = ids_BT.clone()
        other[row, own_T] = (other[row, own_T] + 1) % vocab_size
        moved_BT = (packed_logits(other, documents_BT) - packed).abs().amax(-1)
        deaf += not bool(moved_BT[row, own_T].all())
        moved_BT[row, own_T] = 0
        leaks.append(moved_BT.max())
    return float(torch.stack(errors).max()), float(torch.stack(leaks).max()), deaf


def _gradients_between(
    packed_logits: Callable, embedding: nn.Module, ids_BT: Tensor, documents_BT: Tensor
) -> tuple[float, int]:
    """(largest gradient of a document's loss at the embeddings of other documents, documents
    without one at their own).
    """
    leaves: list[Tensor] = []
    hook = embedding.register_forward_hook(
        lambda _, __, x_BTD: leaves.append(x_BTD.detach().requires_grad_()) or leaves[-1]
    )
    loss_BT = packed_logits(ids_BT, documents_BT).log_softmax(-1)[..., 0]
    hook.remove()
    foreign, unlearned = [], 0
    for row, own_T in _each_document(documents_BT):
        (gradient_BTD,) = torch.autograd.grad(
            loss_BT[row, own_T].sum(), leaves, retain_graph=True, materialize_grads=True
        )
        unlearned += not bool(gradient_BTD[row, own_T].any(-1).all())
        gradient_BTD[row, own_T] = 0
        foreign.append(gradient_BTD.abs().max())
    return float(torch.stack(foreign).max()), unlearned


# --- training and evaluation ----------------------------------------------------------------------


@decides("model.training-forward")
def training_forward(
    limits: SimpleNamespace,
    *,
    model: nn.Module,
    declared_architecture: Mapping[str, Any],
    vocab_size: int,
    max_seq_len: int,
) -> Verdict:
    """In training mode, with its dropout modules off, the model computes what it
    computes in evaluation mode.

    So nothing else that evaluation leaves out is at work in training: no dropout of another kind,
    no branch, no other scale. Experts stay in evaluation mode where a capacity is declared, because
    that is meant to act in training alone.
    """
    ids_BT, errors = (
        _draw_ids((2, min(max_seq_len, 129)), vocab_size, seed=71).to(device_of(model)),
        {},
    )
    capacity = declared_architecture["ffn"].get("capacity_factor") is not None
    with torch.no_grad():
        expected = in_eval(model, ids_BT).double()
    with (
        _modes_kept(model),
        torch.random.fork_rng(devices=[ids_BT.device] if ids_BT.is_cuda else []),
    ):
        model.train()
        for name, module in model.named_modules():
            module.training = not isinstance(module, nn.Dropout) and not (
                capacity and name.endswith(".ffn")
            )
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                off = model(ids_BT).detach().double() - expected
            errors["with gradients" if gradients else "without"] = float(
                off.norm() / expected.norm()
            )
    worst = max(errors, key=errors.__getitem__)
    return decide(
        errors[worst] <= limits.rel_error_max,
        f"with dropout off, logits of training mode are {errors[worst]:.3g} from those of "
        f"evaluation mode ({worst})",
        rel_error=errors[worst],
    )


# --- learning one batch ---------------------------------------------------------------------------


@decides("model.overfit-one-batch")
def overfit_one_batch(
    limits: SimpleNamespace,
    *,
    build_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    train_on: Callable[[nn.Module, torch.optim.Optimizer, Any], float],
    overfit_batch: Any,
    overfit_lr: float,
    eos_id: int,
) -> Verdict:
    """The run's own model, optimizer, loss and clipping learn one small batch by heart,
    end-of-text tokens included.

    `train_on(model, optimizer, batch)` makes one update and returns the mean cross-entropy in nats,
    without any term of balance. `overfit_batch` has input_ids and labels (B, T); its tokens recur
    with different successors, so that only a model that sees its context can learn it. The loss is
    also measured here, without the stack's loss function. Dropout is off, so that the limit means
    the same everywhere.
    """
    if not ambiguous(overfit_batch.input_ids, overfit_batch.labels):
        return failed(
            "every token of the batch has one successor, so learning it shows nothing about "
            "context",
            ambiguous_tokens=0,
        )
    model = build_model().eval()
    optimizer = make_optimizer(model)
    reported, steps, ok = math.inf, 0, False
    while steps < limits.steps_max and not ok:
        for group in optimizer.param_groups:
            group["lr"] = overfit_lr * (1 - steps / limits.steps_max)
        reported, steps = train_on(model, optimizer, overfit_batch), steps + 1
        if reported <= limits.loss_nats_max / 4 or steps == limits.steps_max:
            loss, accuracy, eos_accuracy = _by_heart(model, overfit_batch, eos_id)
            ok = (
                max(loss, reported) <= limits.loss_nats_max
                and min(accuracy, eos_accuracy) >= limits.accuracy_min
            )
    return decide(
        ok,
        f"after {steps} updates on one batch the loss is {loss:.3g} nats (reported "
        f"{reported:.3g}), {accuracy:.0%} of labels are predicted",
        loss_nats=loss,
        reported_nats=reported,
        accuracy=accuracy,
        eos_accuracy=eos_accuracy,
        steps=steps,
    )


@torch.no_grad()
def _by_heart(model: nn.Module, batch: Any, eos_id: int) -> tuple[float, float, float]:
    """Mean loss in nats, share of labels predicted, and share of end-of-text labels predicted."""
    ids, labels = batch.input_ids.to(device_of(model)), batch.labels.to(device_of(model))
    logits, chosen = model(ids), labels != IGNORE
    right, ends = logits.argmax(-1)[chosen] == labels[chosen], labels[chosen] == eos_id
    return (
        _mean_nats(logits, labels),
        float(right.double().mean()),
        float(right[ends].double().mean()) if bool(ends.any()) else 0.0,
    )


def ambiguous(ids_BT: Tensor, labels_BT: Tensor) -> int:
    """How many tokens of a batch have more than one kind of label;
    shows that a batch asks for context.
    """
    followers: dict[int, set[int]] = {}
    for token, label in zip(ids_BT.flatten().tolist(), labels_BT.flatten().tolist()):
        followers.setdefault(token, set()).add(label)
    return sum(len(labels - {IGNORE}) > 1 for labels in followers.values())

"""Gates of the model: the first loss, training against evaluation mode, learning one batch, and a
head that is tied as declared.

B batch, T tokens, D d_model, J rotated pairs of a head, V vocab
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts.gate import Verdict, decide, decides, failed, least, worst, worst_at
from stackproof.contracts.loss import IGNORE
from stackproof.contracts.oracle import rotary_angles
from stackproof.contracts.subject import MicroBatch, Subject


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def draw_ids(shape: tuple[int, ...], vocab_size: int, seed: int) -> Tensor:
    """Random ids from a stream of their own, int64 on the CPU."""
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The whole model in training or evaluation mode; afterwards every module is in its former
    mode.
    """
    modes = [(m, m.training) for m in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, former in modes:
            module.training = former


def in_eval(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Logits with dropout off."""
    with in_mode(model, False):
        return model(ids_BT)


# --- before the first update ----------------------------------------------------------------------


def table_error(tables: tuple[Tensor, Tensor] | None, a: Mapping[str, Any]) -> float:
    """Largest difference of cosine and sine (max_seq_len, J) from the definition; infinite where
    tables are missing, or present without rotary positions.
    """
    if tables is None or a["positions"]["kind"] != "rotary":
        return 0.0 if tables is None and a["positions"]["kind"] != "rotary" else math.inf
    angle_TJ = rotary_angles(a, torch.arange(a["max_seq_len"]))
    pairs = list(zip(tables, (angle_TJ.cos(), angle_TJ.sin())))
    return worst(
        float((got.double().cpu() - b).abs().max()) if got.shape == b.shape else math.inf
        for got, b in pairs
    )


def _mean_nats(logits_BTV: Tensor, labels_BT: Tensor) -> float:
    """Mean −log p of the labels that are not −100, in float64."""
    labels_BT = labels_BT.to(logits_BTV.device)
    chosen = labels_BT != IGNORE
    log_p = logits_BTV.double().log_softmax(-1)[chosen]
    return -float(log_p.gather(1, labels_BT[chosen][:, None]).mean())


@decides("model.tied-head")
def tied_head(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """Embedding and head are one tensor exactly where the configuration declares it."""
    declared = subject.declared.tied_head
    embedding, head = subject.model.embedding.weight, subject.model.head_weight
    tied = embedding is head or embedding.data_ptr() == head.data_ptr()
    text = (
        "the configuration ties embedding and head, and they are two tensors"
        if declared
        else "embedding and head are one tensor"
    )
    return decide(tied == declared, text, tied=tied, declared=declared)


# --- training and evaluation ----------------------------------------------------------------------


@decides("model.training-forward")
def training_forward(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """In training mode, with its dropout modules off, the model computes what it computes in
    evaluation mode.

    So training adds no dropout of another kind, no branch and no other scale. Experts stay in
    evaluation mode where a capacity is declared: it acts in training alone.
    """
    model, errors = subject.model, {}
    ids_BT = draw_ids((2, min(model.max_length, 129)), model.vocab_size, seed=71)
    capacity = subject.declared.architecture["ffn"].get("capacity_factor") is not None
    with torch.no_grad(), model.training(False):
        expected = model.logits(ids_BT).double()
    with model.training(True):
        for name, module in model.module.named_modules():
            limited = capacity and name.endswith(".ffn")
            module.training = not limited and not isinstance(module, nn.Dropout)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                off = model.logits(ids_BT).detach().double() - expected
            errors["with gradients" if gradients else "without"] = float(
                off.norm() / expected.norm()
            )
    mode = worst_at(errors)
    return decide(
        errors[mode] <= limits.rel_error_max,
        f"with dropout off, logits of training mode are {errors[mode]:.3g} from those of "
        f"evaluation mode ({mode})",
        rel_error=errors[mode],
    )


# --- learning one batch ---------------------------------------------------------------------------


@decides("model.overfit-one-batch")
def overfit_one_batch(limits: SimpleNamespace, subject: Subject) -> Verdict:
    """The run's own model, optimizer, loss and clipping overfit one small batch, end-of-text labels
    included.

    Tokens of the batch recur with different successors, so that only a model that uses the context
    can learn them. The loss is also measured here, without the stack's loss function. Dropout is
    off, so that the limit means the same everywhere.
    """
    eos_id, _ = subject.tokenizer.special_ids["eos_token_id"]
    seq_len = min(subject.model.max_length or 24, 24)
    batch = overfit_batch(subject.model.vocab_size, eos_id, seq_len)
    if not ambiguous(batch.input_ids, batch.labels):
        return failed(
            "every token of the batch has one successor, so learning it shows nothing about "
            "context",
            ambiguous_tokens=0,
        )
    model = subject.model.fresh().eval()
    optimizer = subject.training.make_optimizer(model)
    trainee = subject.training.trainee_of(model, optimizer)
    peak_lr = overfit_lr(subject.model.embedding.weight.shape[1])
    reported, steps, ok = math.inf, 0, False
    while steps < limits.steps_max and not ok:
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * (1 - steps / limits.steps_max)
        reported, steps = trainee.update([batch]), steps + 1
        if reported <= limits.loss_nats_max / 4 or steps == limits.steps_max:
            loss, accuracy, eos_accuracy = _learned(model, batch, eos_id)
            ok = (
                worst((loss, reported)) <= limits.loss_nats_max
                and least((accuracy, eos_accuracy)) >= limits.accuracy_min
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


def overfit_batch(vocab_size: int, eos_id: int, seq_len: int) -> MicroBatch:
    """Two rows over a handful of tokens, end of text among them, so that one token has many
    successors. T ≥ 2.

    Each row begins with its own token; only the tokens before distinguish the rest. The
    last token is an end of text in both rows, followed by another one in the first only.
    """
    others = [i for i in range(min(vocab_size, 9)) if i != eos_id]
    kinds = torch.tensor([eos_id, *others[2:]] if len(others) > 2 else [eos_id, *others])
    draw = torch.Generator().manual_seed(41)
    rows = kinds[torch.randint(0, len(kinds), (2, seq_len + 1), generator=draw)]
    rows[:, 0] = torch.tensor([others[0], others[min(1, len(others) - 1)]])
    rows[:, -2] = eos_id
    rows[:, -1] = torch.tensor([eos_id, others[0]])
    return MicroBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def overfit_lr(d_model: int) -> float:
    """Learning rate at which one batch is learned: inverse to the width, at most 1e-2 (measured for
    widths 16 to 512).
    """
    return min(1e-2, 0.2 / d_model)


@torch.no_grad()
def _learned(model: nn.Module, batch: MicroBatch, eos_id: int) -> tuple[float, float, float]:
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
    """Number of tokens of a batch that have labels of more than one kind. Only the context
    distinguishes such labels.
    """
    followers: dict[int, set[int]] = {}
    for token, label in zip(ids_BT.flatten().tolist(), labels_BT.flatten().tolist()):
        followers.setdefault(token, set()).add(label)
    return sum(len(labels - {IGNORE}) > 1 for labels in followers.values())

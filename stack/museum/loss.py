"""Plants in the loss and in gradient accumulation."""

import math

import torch
import torch.nn.functional as F

from stackproof.kernels import cross_entropy
from stackproof.museum.plant import swap
from stackproof.train import losses
from stackproof.train import step as steps


def padding_counted():
    def unmasked(x_BTD, head_VD, labels_BT):
        return F.cross_entropy(
            (x_BTD @ head_VD.T).flatten(0, 1), labels_BT.clamp(min=0).flatten(), reduction="sum"
        )

    with swap(losses, "linear_cross_entropy_sum", unmasked):
        yield


def labels_shifted_twice():
    original = losses.linear_cross_entropy_sum

    def shifted(x_BTD, head_VD, labels_BT):
        return original(x_BTD[:, :-1], head_VD, labels_BT[:, 1:])

    with swap(losses, "linear_cross_entropy_sum", shifted):
        yield


def bits_instead_of_nats():
    original = losses.linear_cross_entropy_sum

    def in_bits(x_BTD, head_VD, labels_BT):
        return original(x_BTD, head_VD, labels_BT) / math.log(2)

    with swap(losses, "linear_cross_entropy_sum", in_bits):
        yield


def mean_of_means():
    original = steps.accumulate

    def accumulate(state, batches):
        parts = list(_one_by_one(original, state, batches))
        _set_gradients(state, [(grads, 1 / len(parts)) for _, _, grads in parts])
        return sum(nats for nats, _, _ in parts) / len(parts), sum(n for _, n, _ in parts)

    with swap(steps, "accumulate", accumulate):
        yield


def _one_by_one(accumulate, state, batches):
    """(mean nats, valid labels, gradients) of each micro-batch by itself."""
    for batch in batches:
        nats, n_valid = accumulate(state, [batch])
        yield (
            nats,
            n_valid,
            {p: p.grad.clone() for p in state.model.parameters() if p.grad is not None},
        )


def _set_gradients(state, weighted):
    """Put a weighted sum of gradients into the model."""
    state.optimizer.zero_grad(set_to_none=True)
    for grads, weight in weighted:
        for p, grad in grads.items():
            p.grad = grad * weight if p.grad is None else p.grad + grad * weight


def undivided_accumulation():
    original = steps.accumulate

    def undivided(state, batches):
        parts = list(_one_by_one(original, state, batches))
        _set_gradients(state, [(grads, 1.0) for _, _, grads in parts])
        n_valid = sum(n for _, n, _ in parts)
        return sum(nats * n for nats, n, _ in parts) / n_valid, n_valid

    with swap(steps, "accumulate", undivided):
        yield


def stale_gradients():
    original = steps.accumulate

    def without_zero_grad(state, batches):
        state.optimizer.zero_grad = lambda set_to_none=True: None
        try:
            return original(state, batches)
        finally:
            del state.optimizer.zero_grad

    with swap(steps, "accumulate", without_zero_grad):
        yield


def rows_leak():
    original = losses.linear_cross_entropy_sum

    def leaking(x_BTD, head_VD, labels_BT):
        labels = labels_BT.clone()
        if len(labels) > 1:
            labels[:, -1] = torch.roll(labels_BT, 1, dims=0)[:, -1]
            labels[0, -1] = labels_BT[0, -1]
        return original(x_BTD, head_VD, labels)

    with swap(losses, "linear_cross_entropy_sum", leaking):
        yield


def nan_micro_batch_skipped():
    original = steps.accumulate

    def skipping(state, batches):
        parts = list(_one_by_one(original, state, batches))
        n_valid = sum(n for _, n, _ in parts)
        kept = [(nats, n, grads) for nats, n, grads in parts if math.isfinite(nats)]
        _set_gradients(state, [(grads, n / n_valid) for _, n, grads in kept])
        return sum(nats * n for nats, n, _ in kept) / n_valid, n_valid

    with swap(steps, "accumulate", skipping):
        yield


def nan_made_zero():
    original = losses.linear_cross_entropy_sum

    def cleaned(x_BTD, head_VD, labels_BT):
        return original(x_BTD.nan_to_num(), head_VD, labels_BT)

    with swap(losses, "linear_cross_entropy_sum", cleaned):
        yield


def z_term_reported():
    original = cross_entropy.linear_cross_entropy

    def together(x_RD, weight_VD, labels_R, **options):
        nats, z = original(x_RD, weight_VD, labels_R, **options | {"z_loss": 1e-4})
        return nats + z, z

    with swap(cross_entropy, "linear_cross_entropy", together):
        yield


def end_of_text_masked():
    original, end = losses.linear_cross_entropy_sum, 0

    def unended(x_BTD, head_VD, labels_BT):
        return original(
            x_BTD, head_VD, labels_BT.masked_fill(labels_BT == end, losses.IGNORE_INDEX)
        )

    with swap(losses, "linear_cross_entropy_sum", unended):
        yield


def end_of_rows_unread():
    original = losses.linear_cross_entropy_sum

    def first_part(x_BTD, head_VD, labels_BT):
        labels_BT = labels_BT.clone()
        labels_BT[:, 128:] = losses.IGNORE_INDEX
        return original(x_BTD, head_VD, labels_BT)

    with swap(losses, "linear_cross_entropy_sum", first_part):
        yield

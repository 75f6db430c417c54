"""Plants in the loss and in gradient accumulation."""

import math

import torch
import torch.nn.functional as F

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
    def accumulate(state, batches):
        state.optimizer.zero_grad(set_to_none=True)
        means = [
            float(
                steps.backward(
                    state, b, losses.count_valid(b.labels) * len(batches), b.input_ids.numel()
                )
            )
            / losses.count_valid(b.labels)
            for b in batches
        ]
        return sum(means) / len(means), sum(losses.count_valid(b.labels) for b in batches)

    with swap(steps, "accumulate", accumulate):
        yield


def undivided_accumulation():
    original = steps.backward

    def undivided(state, batch, n_valid, n_tokens):
        return original(state, batch, losses.count_valid(batch.labels), n_tokens)

    with swap(steps, "backward", undivided):
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
    original = steps.backward

    def skipping(state, *arguments):
        held = {p: None if p.grad is None else p.grad.clone() for p in state.model.parameters()}
        nats = original(state, *arguments)
        if bool(nats.isfinite()):
            return nats
        for parameter, gradient in held.items():
            parameter.grad = gradient
        return torch.zeros_like(nats)

    with swap(steps, "backward", skipping):
        yield


def nan_made_zero():
    original = losses.linear_cross_entropy_sum

    def cleaned(x_BTD, head_VD, labels_BT):
        return original(x_BTD.nan_to_num(), head_VD, labels_BT)

    with swap(losses, "linear_cross_entropy_sum", cleaned):
        yield


def z_term_reported():
    original = losses.dispatch.linear_cross_entropy

    def together(x_RD, weight_VD, labels_R, **options):
        nats, z = original(x_RD, weight_VD, labels_R, **options | {"z_loss": 1e-4})
        return nats + z, z

    with swap(losses.dispatch, "linear_cross_entropy", together):
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

"""Plants in the steps of the run itself that are more than changed text."""

import torch

from stackproof.museum.plant import swap, touch
from stackproof.train import losses
from stackproof.train import step as steps

BAD_STEP = 7


# Waits for a step.
def nan_in_a_weight():
    original = steps.train_step

    def poisoned(state, batches):
        if state.step + 1 == BAD_STEP:
            touch()
            with torch.no_grad():
                next(state.model.parameters())[0, 0] = float("nan")
                list(state.model.parameters())[-1][0] = float("nan")
        return original(state, batches)

    with swap(steps, "train_step", poisoned, counted=False):
        yield


# Waits for a step.
def infinite_activation():
    original_step, original_loss = steps.train_step, losses.linear_cross_entropy_sum
    now = [0]

    def counted(state, batches):
        now[0] = state.step + 1
        return original_step(state, batches)

    def overflowing(x_BTD, head_VD, labels_BT):
        nats = original_loss(x_BTD, head_VD, labels_BT)
        if now[0] != BAD_STEP:
            return nats
        touch()
        return nats * float("inf")

    with (
        swap(steps, "train_step", counted, counted=False),
        swap(losses, "linear_cross_entropy_sum", overflowing, counted=False),
    ):
        yield


# Waits for step 17.
def lr_spike():
    original = steps.lr_at

    def spiking(step, **declared):
        if step <= 16:
            return original(step, **declared)
        touch()
        return original(step, **declared) * 1000

    with swap(steps, "lr_at", spiking, counted=False):
        yield


# Patches a class of torch, and waits for a step.
def skipped_update_counted():
    original, now = torch.amp.GradScaler.step, [0]

    def skipping(self, optimizer):
        now[0] += 1
        if now[0] != BAD_STEP:
            return original(self, optimizer)
        touch()
        return None

    with swap(torch.amp.GradScaler, "step", skipping, counted=False):
        yield


# Strikes in every second call alone.
def wrong_product():
    original, calls = steps.accumulate, [0]

    def now_and_then(state, batches):
        result = original(state, batches)
        calls[0] += 1
        if calls[0] % 2:
            touch()
            grad = next(p.grad for p in state.model.parameters() if p.grad is not None)
            grad.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
        return result

    with swap(steps, "accumulate", now_and_then, counted=False):
        yield


# Takes another order in every call.
def gradients_in_any_order():
    original, calls = steps.accumulate, [0]

    def unordered(state, batches):
        calls[0] += 1
        shift = calls[0] % max(len(batches), 1)
        return original(state, [*batches[shift:], *batches[:shift]])

    with swap(steps, "accumulate", unordered):
        yield

"""Plants in the steps of the run itself."""

import dataclasses

import torch

from stackproof.museum.plant import swap, touch
from stackproof.train import loop, losses, start, state
from stackproof.train import step as steps
from stackproof.train.trainer import StepTimer

BAD_STEP = 7


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


def nan_masked():
    original = steps.accumulate

    def masked(state, batches):
        result = original(state, batches)
        for p in state.model.parameters():
            p.grad = torch.nan_to_num(p.grad * float("nan"))
        return result

    with swap(steps, "accumulate", masked):
        yield


def update_skipped():
    with swap(torch.optim.AdamW, "step", lambda self, closure=None: None):
        yield


def micro_batch_dropped():
    original = loop.draw

    def one_less(trainer):
        return original(trainer)[:-1]

    with swap(loop, "draw", one_less):
        yield


def labels_all_masked():
    original = loop.draw

    def masked(trainer):
        batches = original(trainer)
        return [
            dataclasses.replace(
                b,
                labels=b.labels.clone().index_fill_(
                    1, torch.arange(2, b.labels.shape[1]), losses.IGNORE_INDEX
                ),
            )
            for b in batches
        ]

    with swap(loop, "draw", masked):
        yield


def placeholder_loss():
    original = steps.train_step

    def placeholder(state, batches):
        return dataclasses.replace(original(state, batches), loss_nats=1.0)

    with swap(steps, "train_step", placeholder):
        yield


def instant_steps():
    original = StepTimer.stop

    with swap(StepTimer, "stop", lambda self: original(self) * 1e-6):
        yield


def lr_spike():
    original = steps.lr_at

    def spiking(step, **declared):
        if step <= 16:
            return original(step, **declared)
        touch()
        return original(step, **declared) * 1000

    with swap(steps, "lr_at", spiking, counted=False):
        yield


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


def weights_rounded_to_half():
    original = steps.apply_gradients

    @torch.no_grad()
    def rounding(state, grads, norm):
        original(state, grads, norm)
        for p in state.model.parameters():
            p.copy_(p.bfloat16())

    with swap(steps, "apply_gradients", rounding):
        yield


def tokens_counted_twice():
    original = steps.train_step

    def twice(state, batches):
        report = original(state, batches)
        state.tokens_seen += report.n_tokens
        return dataclasses.replace(report, tokens_seen=state.tokens_seen)

    with swap(steps, "train_step", twice):
        yield


def dropout_unseeded():
    with swap(state, "seed_dropout", lambda seed: torch.seed()):
        yield


def monitor_on_another_runner():
    with swap(loop, "sample", lambda trainer: None):
        yield


def evaluation_never_called():
    with swap(loop, "evaluate", lambda trainer: False):
        yield


def interval_beyond_the_end():
    original = start.setup

    def copied(cfg, *arguments, **options):
        return original(
            cfg.model_copy(update={"sample": cfg.sample.model_copy(update={"every": 1000})}),
            *arguments,
            **options,
        )

    with swap(start, "setup", copied):
        yield


def uphill():
    original_step, original_apply = steps.train_step, steps.apply_gradients
    now = [0]

    def counted(state, batches):
        now[0] = state.step + 1
        return original_step(state, batches)

    def turned(state, grads, norm):
        for grad in grads if now[0] > 40 else ():
            grad.neg_()
        original_apply(state, grads, norm)

    with swap(steps, "train_step", counted), swap(steps, "apply_gradients", turned):
        yield


def mode_left_behind():
    original = loop.memorization

    def resting(model, read, unread, **options):
        result = original(model, read, unread, **options)
        model.eval()
        return result

    with swap(loop, "memorization", resting):
        yield


def seed_not_passed_on():
    original = state.stream_seed
    with swap(
        state,
        "stream_seed",
        lambda seed, name, index=0: original(0 if name == "init" else seed, name, index),
    ):
        yield


def order_of_one_seed():
    original = state.stream_seed
    with swap(
        state,
        "stream_seed",
        lambda seed, name, index=0: original(0 if name == "order" else seed, name, index),
    ):
        yield

"""Plants in what a run says about itself: its clock, its operations,
and results the machine does not repeat.
"""

import torch

from stackproof.museum.plant import swap, touch
from stackproof.train import flops
from stackproof.train import step as steps
from stackproof.train.trainer import StepTimer


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


def gradients_in_any_order():
    original, calls = steps.accumulate, [0]

    def unordered(state, batches):
        calls[0] += 1
        shift = calls[0] % max(len(batches), 1)
        result = original(state, [*batches[shift:], *batches[:shift]])
        return result

    with swap(steps, "accumulate", unordered):
        yield


def update_undone():
    original = steps.train_step

    def undone(state, batches, **kwargs):
        weights = [p.detach().clone() for p in state.model.parameters()]
        report = original(state, batches, **kwargs)
        with torch.no_grad():
            for p, before in zip(state.model.parameters(), weights):
                p.copy_(before)
        return report

    with swap(steps, "train_step", undone):
        yield


def time_without_backward():
    original = StepTimer.stop

    with swap(StepTimer, "stop", lambda self: original(self) / 3):
        yield


def milliseconds_for_seconds():
    original = StepTimer.stop

    with swap(StepTimer, "stop", lambda self: original(self) * 1000):
        yield


def flops_counted_twice():
    original = flops.flops_per_step

    def twice(cfg, vocab_size):
        return 2 * original(cfg, vocab_size)

    with swap(flops, "flops_per_step", twice):
        yield


def flops_without_head():
    original = flops.flops_per_step

    def headless(cfg, vocab_size):
        return (
            original(cfg, vocab_size)
            - 6 * vocab_size * cfg.model.d_model * cfg.train.tokens_per_step
        )

    with swap(flops, "flops_per_step", headless):
        yield

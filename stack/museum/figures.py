"""Plants in what a run says about itself: its clock, its operations,
and results the machine does not repeat.
"""

import torch

from stackproof.museum.plant import plant, swap, touch
from stackproof.train import loop, operations
from stackproof.train import step as steps


@plant(
    "runtime.wrong-product",
    gate="runtime.recomputed-step",
    title="A processor now and then returns a wrong product",
    story=(
        "One core of one machine has a defect that shows at some temperatures only: a bit of a "
        "product is wrong, once in so many thousands. Nothing crashes, no number is out of range, "
        "and the optimizer smooths it away. Who trains again elsewhere gets another model."
    ),
    sources=(
        "https://github.com/pytorch/torchtitan/issues/4334",
        "https://arxiv.org/abs/2102.11245",
    ),
)
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


@plant(
    "runtime.gradients-in-any-order",
    gate="runtime.recomputed-step",
    title="Gradients are added in any order",
    story=(
        "Partial sums are added up as they come in. Each order rounds in its own way, so that two "
        "computations of one step differ in their last digits, and from there on two runs of one "
        "configuration are two runs."
    ),
    sources=("https://github.com/pytorch/torchtitan/issues/1983",),
)
def gradients_in_any_order():
    original, calls = steps.accumulate, [0]

    def unordered(state, batches):
        calls[0] += 1
        shift = calls[0] % max(len(batches), 1)
        result = original(state, [*batches[shift:], *batches[:shift]])
        return result

    with swap(steps, "accumulate", unordered):
        yield


@plant(
    "runtime.update-undone",
    gate="runtime.learned",
    title="Updates are made on a copy",
    story=(
        "The optimizer holds the weights in full precision and a copy computes, and nobody copies "
        "back. Norms, rates and moments look as ever, the weights that are stepped do move, the "
        "log is written every ten steps. After a night the loss is where it was."
    ),
    sources=("https://github.com/pytorch/ao/issues/1124",),
)
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


@plant(
    "runtime.time-without-backward",
    gate="runtime.clock",
    title="The clock stops before the work is done",
    story=(
        "Work on an accelerator is only queued when the call returns. The clock is read without "
        "waiting for it, and a step seems to take a third of its time. The table of speeds is "
        "three times too good, and it is the table that gets quoted."
    ),
    sources=("founding note: ship-two-001", "https://github.com/pytorch/torchtitan/issues/1393"),
)
def time_without_backward():
    original = loop.Run.after_step

    def early(self, report, batches, wall_s):
        return original(self, report, batches, wall_s / 3)

    with swap(loop.Run, "after_step", early):
        yield


@plant(
    "runtime.milliseconds-for-seconds",
    gate="runtime.clock",
    title="Milliseconds where seconds are meant",
    story=(
        "A timer that counts milliseconds takes the place of one that counts seconds. Speeds are "
        "a thousand times too low, and whoever plans by them buys machines that are not needed."
    ),
    sources=("founding note: tinygpt validation",),
)
def milliseconds_for_seconds():
    original = loop.Run.after_step

    def in_milliseconds(self, report, batches, wall_s):
        return original(self, report, batches, wall_s * 1000)

    with swap(loop.Run, "after_step", in_milliseconds):
        yield


@plant(
    "runtime.flops-counted-twice",
    gate="runtime.flops",
    title="Operations are counted twice",
    story=(
        "A multiply-add is counted as two operations, and a helper that already did so is doubled "
        "again. The share of the machine's peak that the run is said to reach doubles with it, "
        "and nobody minds a good figure."
    ),
    sources=("https://github.com/pytorch/torchtitan/issues/1393",),
)
def flops_counted_twice():
    original = operations.flops_per_step

    def twice(cfg, vocab_size):
        return 2 * original(cfg, vocab_size)

    with swap(operations, "flops_per_step", twice):
        yield


@plant(
    "runtime.flops-without-head",
    gate="runtime.flops",
    title="The head is left out of the count",
    story=(
        "A formula counts the layers and leaves out the product with the vocabulary. In a small "
        "model that is a third of the work, so that a step seems slower than it is and time left "
        "is told too short."
    ),
    sources=("https://arxiv.org/abs/2204.02311",),
)
def flops_without_head():
    original = operations.flops_per_step

    def headless(cfg, vocab_size):
        return (
            original(cfg, vocab_size)
            - 6 * vocab_size * cfg.model.d_model * cfg.train.tokens_per_step
        )

    with swap(operations, "flops_per_step", headless):
        yield

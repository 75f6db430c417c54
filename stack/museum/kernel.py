"""Plants in compiled graphs."""

import torch

from stackproof.kernels import cross_entropy
from stackproof.museum.plant import plant, swap
from stackproof.train import state


@plant(
    "kernel.compiled-gradient-zero",
    gate="kernel.compiled-graph",
    title="One gradient of the compiled graph is zero",
    story=(
        "A version of the compiler loses the gradient of one tensor. The forward is right and so "
        "is the loss. The tensor stays where it began while all others learn around it, which "
        "takes thousands of steps to show in a curve and shows in no single one."
    ),
    sources=(
        "https://github.com/pytorch/pytorch/issues/182012",
        "https://github.com/pytorch/pytorch/issues/193061",
        "https://github.com/pytorch/pytorch/issues/138908",
    ),
)
def compiled_gradient_zero():
    original = state.compile_features

    def losing(model):
        graph, lost = original(model), dict(model.named_parameters())["layers.0.ffn.up.weight"]

        def features(*arguments):
            def once(gradient):
                hook.remove()
                return torch.zeros_like(gradient)

            hook = lost.register_hook(once)
            return graph(*arguments)

        return features

    with swap(state, "compile_features", losing):
        yield


@plant(
    "kernel.compile-gives-up",
    gate="kernel.compiled-graph",
    title="Eager runs where a graph was asked for",
    story=(
        "Compiling fails, somebody catches the error and goes on with the plain model. Numbers "
        "are right and nothing is logged. The run takes twice as long as planned and is reported "
        "as compiled."
    ),
    sources=(
        "https://github.com/NVIDIA/Model-Optimizer/pull/2149",
        "https://github.com/pytorch/pytorch/issues/181817",
    ),
)
def compile_gives_up():
    with swap(torch, "compile", lambda model, **options: model):
        yield


@plant(
    "kernel.row-twice-at-a-border",
    gate="kernel.head-borders",
    title="A row at the border of two chunks is read twice",
    story=(
        "The head works through the rows in chunks, so that it never holds all logits. Every "
        "chunk but the first begins one row too early. Small batches fit into one chunk, and with "
        "them every test. In a real run a few rows per step count double, and a loss a little off "
        "is what losses are."
    ),
    sources=(
        "https://github.com/66RING/tiny-flash-attention/issues/12",
        "https://github.com/Dao-AILab/flash-attention/issues/2790",
    ),
)
def row_twice_at_a_border():
    original = cross_entropy.chunks

    def overlapping(n_rows, vocab_size):
        return [slice(max(0, rows.start - 1), rows.stop) for rows in original(n_rows, vocab_size)]

    with swap(cross_entropy, "chunks", overlapping):
        yield

"""Plants in compiled graphs."""

import torch

from stackproof.kernels import cross_entropy
from stackproof.museum.plant import swap
from stackproof.train import state


def compiled_gradient_zero():
    original = state.compile_hidden_states

    def losing(model):
        graph, lost = original(model), dict(model.named_parameters())["layers.0.ffn.up.weight"]

        def hidden_states(*arguments):
            def once(gradient):
                hook.remove()
                return torch.zeros_like(gradient)

            hook = lost.register_hook(once)
            return graph(*arguments)

        return hidden_states

    with swap(state, "compile_hidden_states", losing):
        yield


def compile_gives_up():
    with swap(torch, "compile", lambda model, **options: model):
        yield


def row_twice_at_a_border():
    original = cross_entropy.chunks

    def overlapping(n_rows, vocab_size):
        return [slice(max(0, rows.start - 1), rows.stop) for rows in original(n_rows, vocab_size)]

    with swap(cross_entropy, "chunks", overlapping):
        yield

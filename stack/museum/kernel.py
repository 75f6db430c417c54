"""Plants in compiled graphs and in kernels."""

import torch

from stackproof.kernels import chunked_attention, cross_entropy
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


def keys_lost_in_long_rows():
    original = chunked_attention._weights

    def forgetful(q_BRH, k_BSH, bias, scale):
        weights_BRS = original(q_BRH, k_BSH, bias, scale)
        if k_BSH.shape[1] > 128:
            weights_BRS[..., :32] = 0
            weights_BRS /= weights_BRS.sum(-1, keepdim=True)
        return weights_BRS

    with swap(chunked_attention, "_weights", forgetful):
        yield


def gradient_of_the_last_chunk():
    original = chunked_attention._added

    def first_alone(sum_BSH, part_BJH, keys, S):
        return original(None, part_BJH, keys, S) if sum_BSH is None else sum_BSH

    with swap(chunked_attention, "_added", first_alone):
        yield

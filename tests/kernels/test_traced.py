"""A broken Triton kernel inside a model: tracing names the operation it computes, in every layer; a
right one differs by rounding.
"""

import copy
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from stackproof.config import ModelConfig
from stackproof.kernels import dispatch
from stackproof.kernels.triton import (
    flash_attention,
    flash_attention_kernels,
    rms_norm,
    rope,
    swiglu,
)
from stackproof.model.build import build_model
from stackproof.museum.plant import swap
from stackproof.trace import bisect, compare, variant
from tests.kernels.support import DEVICE, broken

OPERATIONS = ("attention", "rms_norm", "rope", "swiglu")
SIZES = {
    "d_model": 40,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 20,
    "d_ff": 56,
    "max_seq_len": 80,
    "init_std": 0.12,
}
WAYS = {
    "causal mask off by one": "each query sees the key after its own",
    "key heads tiled": "key heads are tiled where each should be repeated for its group",
}
# a module, its text, what it becomes, in how many tokens that shows
BROKEN = {
    "causal mask off by one": (
        flash_attention_kernels,
        "(s_J[None, :] <= p_M[:, None])",
        "(s_J[None, :] <= p_M[:, None] + 1)",
        33,
    ),
    "key heads tiled": (flash_attention_kernels, "n // G *", "n % (N // G) *", 17),
    "every feature multiplied with the next": (
        swiglu,
        "e_E * up_stride[1]",
        "((e_E + 1) % F) * up_stride[1]",
        17,
    ),
    "turned the other way": (rope, ".to(tl.float32) * sign", ".to(tl.float32) * -sign", 17),
    "mean over the tile": (rms_norm, "/ D", "/ E", 17),
}
NAMED = {
    flash_attention_kernels: ("attention_mixed", "attention_mixed"),
    swiglu: ("ffn.swiglu", "ffn.swiglu"),
    rope: ("q_rotated", "k_rotated"),
    rms_norm: ("attention_norm", None),
}


@pytest.fixture(scope="module")
def model():
    return build_model(ModelConfig(**SIZES), 67, seed=3).to(DEVICE).eval()


def ids(tokens, rows=1):
    drawn = torch.Generator().manual_seed(5)
    return torch.randint(0, 67, (rows, tokens), generator=drawn).to(DEVICE)


def with_kernels(model, module=None, copied=None):
    """The model by Triton's kernels, one of them exchanged."""

    @contextmanager
    def around():
        with ExitStack() as stack:
            stack.enter_context(dispatch.using(**dict.fromkeys(OPERATIONS, "triton")))
            if module is flash_attention_kernels:
                stack.enter_context(swap(flash_attention, "kernels", copied))
            elif module is not None:
                name = module.__name__.rpartition(".")[2]
                stack.enter_context(swap(module, name, getattr(copied, name)))
            yield

    return replace(variant(copy.deepcopy(model)), around=around)


@pytest.mark.parametrize("tokens", [1, 17, 33, 80])
def test_kernels_that_are_right_differ_by_rounding_at_every_point(model, tokens):
    found = compare(variant(model), with_kernels(model), ids(tokens, rows=2))
    assert found.first_divergence is None and 0 < max(c.excess for c in found.points) < 0.4


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_named_by_what_it_computes(model, name, tmp_path):
    module, old, new, tokens = BROKEN[name]
    bad = with_kernels(model, module, broken(module, old, new, tmp_path))
    first, last = NAMED[module]
    found = compare(variant(model), bad, ids(tokens))
    assert found.first_divergence.point.name == f"layers.0.{first}" and found.way == WAYS.get(
        name, ""
    )
    kinds = {
        "rope": {"q_rotated", "k_rotated"},
        "rms_norm": {"attention_norm", "ffn_norm", "final_norm"},
    }
    assert {s.point.slot for s in found.suspects} == kinds.get(
        module.__name__.rpartition(".")[2], {first}
    )
    named = [f"layers.0.{first}", "final_norm" if last is None else f"layers.1.{last}"]
    assert [p.name for p in bisect(variant(model), bad, ids(tokens)).guilty] == named


def test_what_shows_in_long_rows_alone_shows_in_them(model, tmp_path):
    """One tile of keys holds a short row, and nothing of an earlier one is rescaled."""
    sums = (flash_attention_kernels, "acc_ME * keep_M[:, None]", "acc_ME")
    bad = with_kernels(model, flash_attention_kernels, broken(*sums, tmp_path))
    assert compare(variant(model), bad, ids(16)).first_divergence is None
    found = compare(variant(model), bad, ids(80))
    assert found.first_divergence.point.name == "layers.0.attention_mixed" and found.way == ""
    assert {s.point.slot for s in found.suspects} == {"attention_mixed"}

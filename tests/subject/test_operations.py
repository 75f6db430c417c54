"""Operations of a step: the formula against a count of the products that run."""

from types import SimpleNamespace

import pytest
import torch

from stackproof.config import DifferentialAttention, MixtureOfExperts, ModelConfig
from stackproof.config.model import HardCapacity, MixtureOfDepths
from stackproof.gate_inputs import operations
from stackproof.model.build import build_model
from stackproof.recipes import RECIPES

SIZES = dict(d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40, max_seq_len=64)
DENSE = ModelConfig(**SIZES)
VARIANTS = {
    "dense": DENSE,
    "untied": DENSE.model_copy(update={"tied_head": False}),
    "differential": DENSE.model_copy(update={"attention": DifferentialAttention()}),
    "experts": DENSE.model_copy(update={"ffn": MixtureOfExperts(n_experts=8, top_k=2)}),
    "experts with little room": DENSE.model_copy(
        update={"ffn": MixtureOfExperts(n_experts=8, top_k=2, capacity_factor=1.0)}
    ),
    "soft depth": DENSE.model_copy(update={"depth": MixtureOfDepths()}),
    "pocket": RECIPES["pocket"]().model,
}


def ratio(model: ModelConfig) -> float:
    cfg = SimpleNamespace(model=model, seed=1, train=SimpleNamespace(tokens_per_step=2048))
    cpu = torch.device("cpu")
    shown = operations.flops_ingredients(
        cfg, 500, lambda: build_model(model, 500, seed=1, device=cpu), cpu
    )
    n_flops, n_tokens = shown["matrix_flops"]()
    return (shown["declared_flops_per_step"] - shown["attention_flops_per_step"]) / (
        n_flops / n_tokens * 2048
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_the_count_is_the_formula(name):
    """To the operation; what a full expert would drop in training is run in evaluation."""
    assert ratio(VARIANTS[name]) == 1.0


def test_hard_depth_is_no_matter_of_a_formula():
    """Which blocks a token meets depends on its scores: the gate is not for it. Measured 0.92."""
    model = DENSE.model_copy(
        update={"depth": MixtureOfDepths(gate=HardCapacity(capacity_frac=0.5))}
    )
    assert 0.8 < ratio(model) < 0.99


def test_attention_is_left_out_of_what_is_compared():
    longer = DENSE.model_copy(update={"max_seq_len": 128})
    assert ratio(longer) == 1.0
    whole = operations.flops_per_step(
        SimpleNamespace(model=longer, train=SimpleNamespace(tokens_per_step=1)), 500
    )
    short = operations.flops_per_step(
        SimpleNamespace(model=DENSE, train=SimpleNamespace(tokens_per_step=1)), 500
    )
    assert whole - short == 12 * 3 * 32 * 64 // 2, (
        "twelve products of the width per further visible key and layer, half of them seen"
    )

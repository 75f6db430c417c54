"""Operations of a step: the formula against a count of the products that run."""

import pytest
import torch

from stackproof.config import DifferentialAttention, MixtureOfExperts, ModelConfig
from stackproof.config.model import HardCapacity, MixtureOfDepths
from stackproof.contracts.gate import call_check
from stackproof.recipes import RECIPES
from stackproof.subject.assemble import subject_of
from stackproof.train import device

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


@pytest.fixture
def ratio(spec, small_cfg, dataset):
    """Declared over counted operations of a run with another model."""

    def of(model: ModelConfig) -> float:
        subject = subject_of(with_model(small_cfg, model), dataset, torch.device("cpu"))
        return call_check(spec.gates["runtime.flops"], subject).measured["declared_over_counted"]

    return of


def with_model(cfg, model, tokens_per_step=2048):
    train = cfg.train.model_copy(update={"tokens_per_step": tokens_per_step})
    return cfg.model_copy(update={"model": model, "train": train})


@pytest.mark.parametrize("name", VARIANTS)
def test_the_count_is_the_formula(ratio, name):
    """To the operation; what a full expert would drop in training is run in evaluation."""
    assert ratio(VARIANTS[name]) == 1.0


def test_hard_depth_is_no_matter_of_a_formula(ratio):
    """Which blocks a token meets depends on its scores: the gate is not for it. Measured 0.92."""
    model = DENSE.model_copy(
        update={"depth": MixtureOfDepths(gate=HardCapacity(capacity_frac=0.5))}
    )
    assert 0.8 < ratio(model) < 0.99


def test_attention_is_left_out_of_what_is_compared(ratio, small_cfg):
    longer = DENSE.model_copy(update={"max_seq_len": 128})
    assert ratio(longer) == 1.0
    whole, short = (
        device.flops_per_step(with_model(small_cfg, model, tokens_per_step=1), 500)
        for model in (longer, DENSE)
    )
    assert whole - short == 12 * 3 * 32 * 64 // 2, (
        "twelve products of the width per further visible key and layer, half of them seen"
    )

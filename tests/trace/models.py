"""Small models of every variant, with weights that no initialisation leaves. B batch, T tokens"""

import torch

from stackproof.config import (
    DifferentialAttention,
    Gelu,
    HardCapacity,
    LearnedPositions,
    MixtureOfDepths,
    MixtureOfExperts,
    ModelConfig,
    SoftGate,
)
from stackproof.model.build import build_model
from tests.export import models as exported

VOCAB = exported.VOCAB
BASE = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 48,
    "max_seq_len": 40,
    "init_std": 0.12,
}
# What no kind of Hugging Face says; the others are tests.export.models.OURS.
MORE = {
    "differential": {"attention": DifferentialAttention()},
    "differential-scalar": {
        "attention": DifferentialAttention(form="scalar", qk_norm=True),
        "positions": LearnedPositions(),
    },
    "gelu-experts": {"ffn": MixtureOfExperts(n_experts=4, expert=Gelu())},
    "soft-depth": {"depth": MixtureOfDepths(gate=SoftGate())},
    "hard-depth": {"depth": MixtureOfDepths(gate=HardCapacity(capacity_frac=0.5), every=2)},
}
OURS = (*exported.OURS, *MORE)
THEIRS = tuple(exported.THEIRS)


def ours(name="plain", n_layers=2):
    """A random model of this stack."""
    if name in exported.OURS:
        return exported.ours(name)
    changes = {} if name == "small" else MORE[name]
    return exported.stirred(
        build_model(ModelConfig(**(BASE | {"n_layers": n_layers} | changes)), VOCAB, seed=5)
    )


def theirs(name):
    """A random model of transformers."""
    return exported.theirs(name)


def ids(rows=2, tokens=17, seed=3):
    """(B, T) int64."""
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))

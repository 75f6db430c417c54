"""Every variant against the float64 oracle, which shares no code with it: logits and all gradients,
by precision and by kernel.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch

from stackproof.config import (
    BiasBalance,
    DifferentialAttention,
    Gelu,
    HardCapacity,
    LayerNorm,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    MixtureOfDepths,
    MixtureOfExperts,
    ModelConfig,
    RotaryPositions,
    SoftmaxAttention,
)
from stackproof.contracts.loss import gradient_errors
from stackproof.contracts.oracle import oracle_reading
from stackproof.kernels import dispatch
from stackproof.model.build import build_model

VOCAB_SIZE, SEED = 50, 3
SIZES = dict(
    d_model=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=32,
    d_ff=40,
    max_seq_len=40,
    init_std=0.2,
)
VARIANTS = {
    "softmax, rotary, SwiGLU": {},
    "QK-norm, biases, window 7": dict(
        attention=SoftmaxAttention(qk_norm=True, qkv_bias=True, out_bias=True, window=7)
    ),
    "rotary, linear scaling": dict(positions=RotaryPositions(scaling=LinearScaling(factor=2.0))),
    "rotary, llama3 scaling": dict(
        positions=RotaryPositions(scaling=Llama3Scaling(original_max_seq_len=16))
    ),
    "learned positions, LayerNorm, GELU": dict(
        positions=LearnedPositions(), norm=LayerNorm(), ffn=Gelu()
    ),
    "head of its own": dict(tied_head=False),
    "differential, paper": dict(attention=DifferentialAttention()),
    "differential, scalar, QK-norm, window 5": dict(
        attention=DifferentialAttention(form="scalar", qk_norm=True, window=5)
    ),
    "experts, auxiliary loss": dict(ffn=MixtureOfExperts(n_experts=4)),
    "experts, selection bias, GELU, top 1": dict(
        ffn=MixtureOfExperts(n_experts=3, top_k=1, balance=BiasBalance(), expert=Gelu())
    ),
    "depths, soft gate": dict(depth=MixtureOfDepths(every=2)),
    "depths, hard capacity": dict(
        depth=MixtureOfDepths(gate=HardCapacity(capacity_frac=0.4), every=2)
    ),
    "differential, depths, experts": dict(
        attention=DifferentialAttention(),
        depth=MixtureOfDepths(every=2),
        ffn=MixtureOfExperts(n_experts=4),
    ),
}
TRITON = {op: "triton" for op in ("attention", "rms_norm", "rope", "swiglu")}
# Worst relative error in the 2-norm. float32: measured 7e-7 of the logits, 3e-6 of a gradient. That
# of a λ is one sum over all positions that mostly cancel, measured 2e-4. bfloat16 keeps 8 bits, so
# a rounding is up to 4e-3, and tens follow each other: measured 2e-2.
LOGITS_MAX, GRADIENT_MAX, LAMBDA_MAX, BFLOAT16_MAX = 3e-6, 1e-5, 1e-3, 4e-2
# relative margin of a choice that bfloat16, at 2^-8 a rounding, does not turn around
SURE = 2.0**-5


@dataclass(frozen=True)
class Errors:
    """Relative, in the 2-norm: of the logits, the worst of any one gradient, and the worst of a
    λ's; `compared` is a share of tokens.
    """

    logits: float
    gradient: float
    lambda_gradient: float
    compared: float

    @property
    def rounding_alone(self) -> bool:
        return (
            self.logits <= LOGITS_MAX
            and self.gradient <= GRADIENT_MAX
            and self.lambda_gradient <= LAMBDA_MAX
        )


def made(name: str):
    """(model, ids (2, 33), documents (2, 33)) of a variant: weights wide enough for attention to be
    uneven and choices to be clear.
    """
    model = build_model(ModelConfig(**SIZES | VARIANTS[name]), VOCAB_SIZE, seed=SEED).eval()
    chance = torch.Generator().manual_seed(SEED)
    ids_BT = torch.randint(0, VOCAB_SIZE, (2, 33), generator=chance)
    documents_BT = (torch.arange(33) >= torch.tensor([[33], [12]])).long()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not parameter_name.endswith("lambda_weight"):
                parameter += 0.2 * torch.randn(parameter.shape, generator=chance)
    return model, ids_BT, documents_BT


def errors(
    name: str, *, dtype=torch.float32, kernels=None, compile=lambda features: features
) -> Errors:
    """How far a variant is from the oracle.

    In half precision only tokens are compared whose routers chose clearly, and gradients, to which
    the others contribute, are not.
    """
    model, ids_BT, documents_BT = made(name)
    leaves = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    wanted = oracle_reading(
        ids_BT, leaves | dict(model.named_buffers()), model.cfg.model_dump(), documents_BT
    )
    weigh_BTV = torch.randn(
        wanted.logits_BTV.shape, generator=torch.Generator().manual_seed(SEED + 1)
    )
    autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    with autocast, dispatch.using(**(kernels or {})):
        x_BTD, _ = compile(model.hidden_states)(ids_BT, None, documents_BT)
        logits_BTV = model.logits(x_BTD).float()
        (logits_BTV * weigh_BTV).sum().backward()
    sure_BT = wanted.margin_BT > (SURE if dtype != torch.float32 else 0)
    gap = (logits_BTV.detach().double() - wanted.logits_BTV.detach())[
        sure_BT
    ].norm() / wanted.logits_BTV.detach()[sure_BT].norm()
    (wanted.logits_BTV * weigh_BTV).sum().backward()
    found = gradient_errors(
        {n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in leaves.items()}
    )
    of_lambda = max((e for n, e in found.items() if ".lambda_" in n), default=0.0)
    return Errors(
        float(gap),
        max(e for n, e in found.items() if ".lambda_" not in n),
        of_lambda,
        float(sure_BT.double().mean()),
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_is_the_oracle_to_rounding(name):
    found = errors(name)
    assert found.rounding_alone and found.compared == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_is_the_oracle_to_its_rounding(name):
    found = errors(name, dtype=torch.bfloat16)
    assert found.compared > 0.5 and 1e-4 < found.logits <= BFLOAT16_MAX


@pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: it exists for Linux only"
)
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton's interpreter is chosen when Triton is first imported",
)
@pytest.mark.parametrize("name", VARIANTS)
def test_triton_is_the_oracle_to_rounding(name):
    assert errors(name, kernels=TRITON).rounding_alone


def test_one_percent_of_one_weight_is_seen(monkeypatch):
    honest = oracle_reading

    def skewed(ids_BT, weights, *rest):
        return honest(
            ids_BT,
            weights
            | {"layers.1.attention.out.weight": 1.01 * weights["layers.1.attention.out.weight"]},
            *rest,
        )

    monkeypatch.setitem(globals(), "oracle_reading", skewed)
    found = errors("softmax, rotary, SwiGLU")
    assert found.logits > 100 * LOGITS_MAX and found.gradient > 100 * GRADIENT_MAX

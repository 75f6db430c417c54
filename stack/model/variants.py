"""From the types of the configuration to modules: the one place that knows all variants."""

from typing import assert_never

from torch import nn

from stackproof.config import (
    DifferentialAttention,
    FullDepth,
    Gelu,
    HardCapacity,
    LayerNorm,
    MixtureOfDepths,
    MixtureOfExperts,
    ModelConfig,
    RmsNorm,
    SoftGate,
    SoftmaxAttention,
    SwiGLU,
)
from stackproof.model import attention, depth, feedforward, moe, norm


def make_norm(cfg: ModelConfig) -> nn.Module:
    """The norm of the residual stream."""
    match cfg.norm:
        case RmsNorm():
            return norm.RMSNorm(cfg.d_model, cfg.norm_eps)
        case LayerNorm():
            return norm.LayerNorm(cfg.d_model, cfg.norm_eps)
        case other:
            assert_never(other)


def make_attention(cfg: ModelConfig, layer: int) -> nn.Module:
    """The attention of block `layer`, counted from 0."""
    match cfg.attention:
        case SoftmaxAttention():
            return attention.SoftmaxAttention(cfg, layer)
        case DifferentialAttention():
            return attention.DifferentialAttention(cfg, layer)
        case other:
            assert_never(other)


def make_feedforward(cfg: ModelConfig, declared: SwiGLU | Gelu | MixtureOfExperts) -> nn.Module:
    """A feed-forward, or experts and their router."""
    match declared:
        case SwiGLU():
            return feedforward.SwiGLU(cfg)
        case Gelu():
            return feedforward.GeluMLP(cfg, declared)
        case MixtureOfExperts():
            return moe.MixtureOfExperts(
                cfg,
                declared,
                [make_feedforward(cfg, declared.expert) for _ in range(declared.n_experts)],
            )
        case other:
            assert_never(other)


def make_depth(cfg: ModelConfig, layer: int) -> nn.Module:
    """Which tokens block `layer` changes."""
    match cfg.depth:
        case MixtureOfDepths(gate=SoftGate(), every=every) if (layer + 1) % every == 0:
            return depth.SoftGate(cfg)
        case MixtureOfDepths(gate=HardCapacity(capacity_frac=share), every=every) if (
            layer + 1
        ) % every == 0:
            return depth.HardCapacity(cfg, layer, share)
        case FullDepth() | MixtureOfDepths():
            return depth.EveryToken()
        case other:
            assert_never(other)

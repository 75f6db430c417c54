"""Builds the module of each variant; the only file with a list of all variants.

spec/architecture.py declares the weights and values of each variant.
"""

from typing import assert_never

from torch import nn

from stackproof.config import model as declared
from stackproof.config.model import ModelConfig
from stackproof.model import attention, feed_forward, mixture_of_depths, moe, norm, positions


def make_positions(cfg: ModelConfig) -> nn.Module:
    """Rotary tables or learned vectors; halves of a differential head are rotated apart."""
    match cfg.positions:
        case declared.RotaryPositions(scaling=scaling):
            halves = isinstance(cfg.attention, declared.DifferentialAttention)
            width = cfg.head_dim // 2 if halves else cfg.head_dim
            return positions.Rotary(width, cfg.max_seq_len, cfg.rope_theta, scaling)
        case declared.LearnedPositions():
            return positions.Learned(cfg.max_seq_len, cfg.d_model)
        case other:
            assert_never(other)


def make_norm(cfg: ModelConfig) -> nn.Module:
    """The norm of the residual stream."""
    match cfg.norm:
        case declared.RmsNorm():
            return norm.RMSNorm(cfg.d_model, cfg.norm_eps)
        case declared.LayerNorm():
            return norm.LayerNorm(cfg.d_model, cfg.norm_eps)
        case other:
            assert_never(other)


def make_attention(cfg: ModelConfig, layer: int) -> nn.Module:
    """The attention of block `layer`, counted from 0."""
    match cfg.attention:
        case declared.SoftmaxAttention():
            return attention.SoftmaxAttention(cfg, layer)
        case declared.DifferentialAttention():
            return attention.DifferentialAttention(cfg, layer)
        case other:
            assert_never(other)


def make_feedforward(cfg: ModelConfig, ffn: declared.FeedForward) -> nn.Module:
    """A feed-forward, or experts and their router."""
    match ffn:
        case declared.SwiGLU():
            return feed_forward.SwiGLU(cfg)
        case declared.Gelu():
            return feed_forward.GeluMLP(cfg, ffn)
        case declared.MixtureOfExperts(expert=expert, n_experts=n_experts):
            experts = [make_feedforward(cfg, expert) for _ in range(n_experts)]
            return moe.MixtureOfExperts(cfg, ffn, experts)
        case other:
            assert_never(other)


def make_gate(cfg: ModelConfig, layer: int) -> nn.Module | None:
    """The gate of block `layer`, or None if every token goes through the block."""
    match cfg.depth:
        case declared.MixtureOfDepths(every=every) if (layer + 1) % every:
            return None
        case declared.MixtureOfDepths(gate=declared.SoftGate()):
            return mixture_of_depths.SoftGate(cfg)
        case declared.MixtureOfDepths(gate=declared.HardCapacity(capacity_frac=share)):
            return mixture_of_depths.HardCapacity(cfg, layer, share)
        case declared.FullDepth():
            return None
        case other:
            assert_never(other)

"""Numbers that follow from a configuration by arithmetic. The stack asserts them, the integrity checker recomputes them."""

import math


def parameter_count(model: dict, vocab_size: int) -> int:
    """Parameters of a decoder from its resolved `model` section: RMSNorm, GQA, SwiGLU, tied or untied head.

    `model` holds d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff, tied_head.
    """
    d, f = model["d_model"], model["d_ff"]
    q_width, kv_width = model["n_heads"] * model["head_dim"], model["n_kv_heads"] * model["head_dim"]
    attention = d * q_width + 2 * d * kv_width + q_width * d
    block = attention + 3 * d * f + 2 * d
    head = 0 if model["tied_head"] else vocab_size * d
    return vocab_size * d + model["n_layers"] * block + d + head


def flops_per_token(model: dict, vocab_size: int, seq_len: int, *, backward: bool = True) -> int:
    """Floating-point operations of matrix products per trained token (a multiply-add counts as two).

    6·(matrix parameters incl. the head) + 12·layers·q_width·seq_len/2 for causal attention scores and mixing
    (PaLM, arXiv:2204.02311, app. B, halved for causality). Forward alone is a third of it.
    """
    d = model["d_model"]
    q_width = model["n_heads"] * model["head_dim"]
    norms = (2 * model["n_layers"] + 1) * d
    embedding = vocab_size * d
    matrices = parameter_count(model, vocab_size) - norms - embedding + (embedding if model["tied_head"] else 0)
    per_token = 2 * matrices + 2 * model["n_layers"] * q_width * seq_len
    return per_token * (3 if backward else 1)


def tokens_seen(steps: int, micro_batch_size: int, seq_len: int, accumulation: int, world_size: int) -> int:
    """Tokens a run has consumed: steps × micro-batch rows × length × accumulation × ranks."""
    return steps * micro_batch_size * seq_len * accumulation * world_size


def perplexity(loss_nats: float) -> float:
    """exp of a mean cross-entropy in nats."""
    return math.exp(loss_nats)


def bits_per_byte(total_nats: float, n_bytes: int) -> float:
    """Total negative log-likelihood in nats over the bytes it covers, in bits per byte."""
    return total_nats / math.log(2) / n_bytes

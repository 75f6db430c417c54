"""Quantities computed from a configuration: parameters, FLOPs, activations, tokens.

The stack asserts them, and the integrity check recomputes them. Weights and values of a variant
come from spec/architecture.py.
"""

import math

from stackproof.spec import resolved_model as resolved
from stackproof.spec.architecture import Q_WIDTH, Buffer, Matrix, Model


def parameter_count(model: Model, vocab_size: int) -> int:
    """Parameters of a decoder from its resolved `model` section.

    A part that an old section omits counts as its first variant. Raises IntegrityError for a
    variant without an entry in the architecture table.
    """
    held = resolved.tensors(model, vocab_size)
    return sum(t.entries for t in held if not isinstance(t.weight, Buffer))


def flops_per_token(model: Model, vocab_size: int, seq_len: int, *, backward: bool = True) -> int:
    """FLOPs of matrix products per trained token; a multiply-add counts as two.

    6·(matrix entries used per token, head included), and for attention 12·q_width·(mean number of
    visible keys) per layer (PaLM, arXiv:2204.02311, app. B, halved for causality). A token uses
    top_k experts; a block with hard capacity reads a share of the tokens. The forward alone takes a
    third. A `seq_len` of 0 omits the products of attention.
    """
    per_token = 2.0 * vocab_size * model["d_model"]  # the head, or the embedding if tied
    q_width = Q_WIDTH.of(resolved.sizes(model))
    mixing = resolved.part(model, "attention").products_per_key
    for layer in range(model["n_layers"]):
        share = resolved.share_of_tokens(model, layer)
        held = resolved.block_tensors(model, layer)
        met = sum(t.met * t.entries for t in held if isinstance(t.weight, Matrix))
        attention = 2 * mixing * q_width * _visible_keys(model, share * seq_len)
        per_token += share * (2 * int(met) + attention)
    return round(per_token) * (3 if backward else 1)


def saved_per_token(model: Model) -> int:
    """Activations per token that a block keeps for the backward; those of a gated block if the
    model has one.
    """
    numbers = resolved.sizes(model)
    return max(
        sum(v.kept * resolved.width_of(v, numbers) for v in resolved.block_values(model, layer))
        for layer in range(model["n_layers"])
    )


def _visible_keys(model: Model, seq_len: float) -> float:
    """Mean number of visible keys per query over a row, within the window if declared."""
    window = min(resolved.section(model, "attention").get("window") or seq_len, seq_len)
    return window - window * window / (2 * seq_len) if seq_len else 0.0


def tokens_seen(
    steps: int, micro_batch_size: int, seq_len: int, accumulation: int, world_size: int
) -> int:
    """Tokens consumed by a run: steps × micro-batch rows × length × accumulation × ranks."""
    return steps * micro_batch_size * seq_len * accumulation * world_size


def perplexity(loss_nats: float) -> float:
    """exp of a mean cross-entropy in nats."""
    return math.exp(loss_nats)


def bits_per_byte(total_nats: float, n_bytes: int) -> float:
    """Total negative log-likelihood in nats over the bytes it covers, in bits per byte."""
    return total_nats / math.log(2) / n_bytes

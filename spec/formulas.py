"""Numbers that follow from a configuration by arithmetic.
The stack asserts them, the integrity checker recomputes them.
"""

import math


def parameter_count(model: dict, vocab_size: int) -> int:
    """Parameters of a decoder from its resolved `model` section; a section from before a variant
    existed counts as its first form.

    `model` holds d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff, max_seq_len, tied_head,
    and by kind positions, norm, attention, ffn, depth. Raises ValueError for a kind it does not
    know.
    """
    blocks = sum(
        _block_matrices(model, i)[0] + _block_vectors(model, i) for i in range(model["n_layers"])
    )
    positions = (
        model["max_seq_len"] * model["d_model"]
        if _kind(model, "positions", "rotary") == "learned"
        else 0
    )
    embedding = vocab_size * model["d_model"]
    return embedding + positions + blocks + _norm(model) + (0 if model["tied_head"] else embedding)


def flops_per_token(model: dict, vocab_size: int, seq_len: int, *, backward: bool = True) -> int:
    """Floating-point operations of matrix products per trained token (a
    multiply-add counts as two).

    6·(matrix parameters a token meets, incl. the head) + 12·q_width·(mean number of visible keys)
    per layer for attention (PaLM, arXiv:2204.02311, app. B, halved for causality). A token meets
    top_k experts, and blocks with hard capacity only at times. Forward alone is a third of it, and
    a `seq_len` of 0 leaves the products of attention out.
    """
    per_token = 2.0 * vocab_size * model["d_model"]
    q_width = model["n_heads"] * model["head_dim"]
    # products of q_width per visible key
    mixing = 3 if _kind(model, "attention", "softmax") == "differential" else 2
    for layer in range(model["n_layers"]):
        share = _share_of_tokens(model, layer)
        per_token += share * (
            2 * _block_matrices(model, layer)[1]
            + 2 * mixing * q_width * _visible_keys(model, share * seq_len)
        )
    return round(per_token) * (3 if backward else 1)


def _kind(model: dict, part: str, default: str) -> str:
    return model.get(part, {}).get("kind", default)


def _norm(model: dict) -> int:
    """Entries of one norm over the residual stream."""
    return model["d_model"] * (2 if _kind(model, "norm", "rmsnorm") == "layernorm" else 1)


def _gated(model: dict, layer: int) -> bool:
    depth = model.get("depth", {})
    return depth.get("kind") == "mixture-of-depths" and (layer + 1) % depth["every"] == 0


def _share_of_tokens(model: dict, layer: int) -> float:
    """Share of the tokens (0-1) that a block reads."""
    gate = model["depth"]["gate"] if _gated(model, layer) else {}
    return gate.get("capacity_frac", 1.0)


def _visible_keys(model: dict, seq_len: float) -> float:
    """Keys a query sees on average over a row, in a window if there is one."""
    window = min(model.get("attention", {}).get("window") or seq_len, seq_len)
    return window - window * window / (2 * seq_len) if seq_len else 0.0


def _block_matrices(model: dict, layer: int) -> tuple[int, int]:
    """Matrix entries of a block: all of them, and those that one token meets."""
    d, q_width, kv_width = (
        model["d_model"],
        model["n_heads"] * model["head_dim"],
        model["n_kv_heads"] * model["head_dim"],
    )
    shared = 2 * d * q_width + 2 * d * kv_width + (d if _gated(model, layer) else 0)
    ffn = model.get("ffn", {})
    match ffn.get("kind", "swiglu"):
        case "swiglu" | "gelu" as kind:
            return shared + _expert(model, kind), shared + _expert(model, kind)
        case "moe":
            shared += ffn["n_experts"] * d
            one = _expert(model, ffn["expert"]["kind"])
            return shared + ffn["n_experts"] * one, shared + ffn["top_k"] * one
        case other:
            raise ValueError(f"no formula for model.ffn.kind = {other}")


def _expert(model: dict, kind: str) -> int:
    """Matrix entries of one feed-forward."""
    return (3 if kind == "swiglu" else 2) * model["d_model"] * model["d_ff"]


def _block_vectors(model: dict, layer: int) -> int:
    """Entries of a block that are no matrix: norms, biases, gains and the scalars of variants."""
    d, h = model["d_model"], model["head_dim"]
    attention, ffn = model.get("attention", {}), model.get("ffn", {})
    count = 2 * _norm(model) + (1 if _gated(model, layer) else 0)
    if attention.get("qkv_bias"):
        count += (model["n_heads"] + 2 * model["n_kv_heads"]) * h
    if attention.get("out_bias"):
        count += d
    match attention.get("kind", "softmax"):
        case "softmax":
            count += 2 * h if attention.get("qk_norm") else 0
        case "differential":
            count += h if attention["qk_norm"] else 0
            count += 2 * h + h if attention["form"] == "paper" else 1
        case other:
            raise ValueError(f"no formula for model.attention.kind = {other}")
    experts, one = (ffn["n_experts"], ffn["expert"]) if ffn.get("kind") == "moe" else (1, ffn)
    return count + (
        experts * (model["d_ff"] + d) if one.get("kind") == "gelu" and one["bias"] else 0
    )


def tokens_seen(
    steps: int, micro_batch_size: int, seq_len: int, accumulation: int, world_size: int
) -> int:
    """Tokens a run has consumed: steps × micro-batch rows × length × accumulation × ranks."""
    return steps * micro_batch_size * seq_len * accumulation * world_size


def perplexity(loss_nats: float) -> float:
    """exp of a mean cross-entropy in nats."""
    return math.exp(loss_nats)


def bits_per_byte(total_nats: float, n_bytes: int) -> float:
    """Total negative log-likelihood in nats over the bytes it covers, in bits per byte."""
    return total_nats / math.log(2) / n_bytes

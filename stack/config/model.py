"""The `model` section: sizes are numbers, and every choice of architecture is a type."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stackproof.config.base import Frozen

# --- positions ------------------------------------------------------------------------------------


class Unscaled(Frozen):
    """Rotary frequencies of `rope_theta`, unscaled."""

    kind: Literal["none"] = "none"


class LinearScaling(Frozen):
    """All rotary frequencies divided by one factor (arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1, description="context length over that of the original training")


class Llama3Scaling(Frozen):
    """Low rotary frequencies divided by a factor, high ones kept, those between interpolated (Llama
    3.1).
    """

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(8.0, ge=1, description="divisor of low frequencies")
    low_freq_factor: float = Field(
        1.0,
        gt=0,
        description="frequencies with a wavelength above original_max_seq_len over this "
        "are divided",
    )
    high_freq_factor: float = Field(
        4.0,
        gt=0,
        description="frequencies with a wavelength below original_max_seq_len over this are kept",
    )
    original_max_seq_len: int = Field(
        8192, ge=2, description="context length of the original training, tokens"
    )

    @model_validator(mode="after")
    def _ordered(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"positions.scaling.high_freq_factor ({self.high_freq_factor:g}) must be above "
                f"low_freq_factor ({self.low_freq_factor:g})"
            )
        return self


class RotaryPositions(Frozen):
    """Rotary position embedding of queries and keys (arXiv:2104.09864); the base is
    model.rope_theta.
    """

    kind: Literal["rotary"] = "rotary"
    scaling: Annotated[Unscaled | LinearScaling | Llama3Scaling, Field(discriminator="kind")] = (
        Unscaled()
    )


class LearnedPositions(Frozen):
    """A learned vector per position, added to the embedding (GPT-2)."""

    kind: Literal["learned"] = "learned"


# --- norms ----------------------------------------------------------------------------------------


class RmsNorm(Frozen):
    """Root-mean-square normalisation with a gain (arXiv:1910.07467)."""

    kind: Literal["rmsnorm"] = "rmsnorm"


class LayerNorm(Frozen):
    """Mean and variance normalisation with gain and bias (arXiv:1607.06450)."""

    kind: Literal["layernorm"] = "layernorm"


# --- attention ------------------------------------------------------------------------------------


class Attention(Frozen):
    """Fields of every kind of attention."""

    qk_norm: bool = Field(
        False, description="RMSNorm of each query and key head before rotation (Qwen3)"
    )
    qkv_bias: bool = Field(False, description="biases on queries, keys and values (Qwen2, GPT-2)")
    out_bias: bool = Field(False, description="bias on the output projection (GPT-2)")
    window: int | None = Field(
        None,
        ge=1,
        description="sliding window: visible keys per query, its own included, tokens; none: all "
        "earlier keys (Mistral)",
    )


class SoftmaxAttention(Attention):
    """softmax(q·k/√H)·v."""

    kind: Literal["softmax"] = "softmax"


class DifferentialAttention(Attention):
    """The difference of two softmax maps over halves of each head (arXiv:2410.05258).

    `paper`: λ from four learned vectors, RMSNorm per head, scaled by 1 − λ_init.
    `scalar`: one learned λ per layer and no head norm.
    """

    kind: Literal["differential"] = "differential"
    form: Literal["paper", "scalar"] = Field(
        "paper", description="parametrisation of λ, and whether heads are normalised"
    )


# --- feed-forward ---------------------------------------------------------------------------------


class SwiGLU(Frozen):
    """down(silu(gate(x)) · up(x)), without biases (arXiv:2002.05202)."""

    kind: Literal["swiglu"] = "swiglu"


class Gelu(Frozen):
    """down(gelu(up(x)))."""

    kind: Literal["gelu"] = "gelu"
    bias: bool = Field(True, description="biases on both projections (GPT-2)")
    approximate: Literal["tanh", "none"] = Field(
        "tanh", description="the tanh formula of GPT-2, or the exact one"
    )


Dense = SwiGLU | Gelu  # the kinds of an expert


class AuxiliaryLoss(Frozen):
    """Load-balancing loss: n_experts · Σ (share of choices)·(mean probability) over all top_k
    choices; 1 for an even load (arXiv:2101.03961).
    """

    kind: Literal["auxiliary-loss"] = "auxiliary-loss"
    weight: float = Field(0.01, gt=0, description="factor of the balance term, nats")


class BiasBalance(Frozen):
    """A bias per expert that enters only the selection. Each update moves it against the load
    (arXiv:2408.15664).
    """

    kind: Literal["selection-bias"] = "selection-bias"
    rate: float = Field(1e-3, gt=0, description="change of a bias per update")


class MixtureOfExperts(Frozen):
    """Mixture of experts: a router without bias sends each token to `top_k` of `n_experts`
    feed-forwards, with weights renormalised over the chosen ones.

    With top_k = 1 the weight is the probability itself. Renormalised it would be 1, and the router
    would get no gradient from the loss.
    """

    kind: Literal["moe"] = "moe"
    n_experts: int = Field(
        8, ge=2, le=2**14, description="feed-forwards per layer, each of width d_ff"
    )
    top_k: int = Field(2, ge=1, description="experts per token")
    expert: Annotated[Dense, Field(discriminator="kind")] = SwiGLU()
    balance: Annotated[AuxiliaryLoss | BiasBalance, Field(discriminator="kind")] = AuxiliaryLoss()
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description=(
            "capacity of an expert in training, over its even share of the tokens; later tokens "
            "are dropped; none: no limit"
        ),
    )

    @model_validator(mode="after")
    def _consistent(self):
        if self.top_k > self.n_experts:
            raise ValueError(
                f"model.ffn.top_k ({self.top_k}) must be at most model.ffn.n_experts "
                f"({self.n_experts})"
            )
        return self


FeedForward = Dense | MixtureOfExperts

# --- depth ----------------------------------------------------------------------------------------


class FullDepth(Frozen):
    """No mixture of depths: every block processes every token."""

    kind: Literal["full"] = "full"


class SoftGate(Frozen):
    """The change that the block makes to a token is scaled by σ(w·x + b)."""

    kind: Literal["soft"] = "soft"


class HardCapacity(Frozen):
    """A block reads a token if its score is among the highest `capacity_frac` so far. No token
    depends on later ones.
    """

    kind: Literal["hard"] = "hard"
    capacity_frac: float = Field(
        0.5, gt=0, lt=1, description="share of the tokens that a gated block reads (0-1)"
    )


class MixtureOfDepths(Frozen):
    """Mixture of depths: gated blocks scale their change per token, or skip tokens
    (arXiv:2404.02258).
    """

    kind: Literal["mixture-of-depths"] = "mixture-of-depths"
    gate: Annotated[SoftGate | HardCapacity, Field(discriminator="kind")] = SoftGate()
    every: int = Field(
        1,
        ge=1,
        description="every n-th block is gated; 1: all blocks",
    )


# --- model ----------------------------------------------------------------------------------------


class ModelConfig(Frozen):
    """A model. The upper limits are far above every published model: they bound the loops and
    allocations that a damaged or hostile file can cause.
    """

    d_model: int = Field(ge=8, le=2**20, description="width of the residual stream, features")
    n_layers: int = Field(ge=1, le=2**12, description="blocks")
    n_heads: int = Field(ge=1, le=2**14, description="query heads")
    n_kv_heads: int = Field(ge=1, le=2**14, description="key/value heads")
    head_dim: int = Field(
        ge=2, le=2**16, description="width of a head, features; even, for rotary pairs"
    )
    d_ff: int = Field(
        ge=8, le=2**22, description="inner width of the feed-forward or of one expert, features"
    )
    max_seq_len: int = Field(ge=2, le=2**24, description="context length, tokens")
    positions: Annotated[RotaryPositions | LearnedPositions, Field(discriminator="kind")] = (
        RotaryPositions()
    )
    rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary frequencies")
    norm: Annotated[RmsNorm | LayerNorm, Field(discriminator="kind")] = RmsNorm()
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square or variance in norms")
    attention: Annotated[SoftmaxAttention | DifferentialAttention, Field(discriminator="kind")] = (
        SoftmaxAttention()
    )
    ffn: Annotated[FeedForward, Field(discriminator="kind")] = SwiGLU()
    depth: Annotated[FullDepth | MixtureOfDepths, Field(discriminator="kind")] = FullDepth()
    tied_head: bool = Field(True, description="use the embedding as the output head")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="dropout probability of the residual branches in training (0-1)",
    )
    init_std: float = Field(
        0.02, gt=0, description="standard deviation of embedding and input projections at step 0"
    )

    @model_validator(mode="after")
    def _consistent(self):
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model.n_kv_heads ({self.n_kv_heads}) must divide model.n_heads ({self.n_heads})"
            )
        rotary, halves = self.positions.kind == "rotary", self.attention.kind == "differential"
        unit = (2 if rotary else 1) * (2 if halves else 1)
        reasons = [
            t
            for on, t in (
                (rotary, "rotary positions turn pairs of features"),
                (halves, "differential heads have halves"),
            )
            if on
        ]
        if self.head_dim % unit:
            number = "even" if unit == 2 else f"a multiple of {unit}"
            raise ValueError(
                f"model.head_dim ({self.head_dim}) must be {number}: {' and '.join(reasons)}"
            )
        if not rotary and self.rope_theta != ModelConfig.model_fields["rope_theta"].default:
            raise ValueError(
                f"model.rope_theta ({self.rope_theta:g}) has no effect with model.positions.kind "
                "= learned"
            )
        if (window := self.attention.window) is not None and window > self.max_seq_len:
            raise ValueError(
                f"model.attention.window ({window}) is above model.max_seq_len "
                f"({self.max_seq_len}), so it has no effect"
            )
        if self.depth.kind == "mixture-of-depths" and self.depth.every > self.n_layers:
            raise ValueError(
                f"model.depth.every ({self.depth.every}) is above model.n_layers "
                f"({self.n_layers}), so no block would be gated"
            )
        return self

    def summary(self) -> str:
        """One line with the kinds of the decoder's parts."""
        shared = f"{self.n_heads} heads"
        if self.n_kv_heads < self.n_heads:
            shared += f" on {self.n_kv_heads}"
        extras = [
            name for name in ("qk_norm", "qkv_bias", "out_bias") if getattr(self.attention, name)
        ]
        extras += [f"window {self.attention.window}"] if self.attention.window else []
        ffn = self.ffn.kind
        if isinstance(self.ffn, MixtureOfExperts):
            ffn = f"{self.ffn.n_experts} {self.ffn.expert.kind} experts, top {self.ffn.top_k}"
        attention = ", ".join((f"{self.attention.kind} attention, {shared}", *extras))
        parts = [self.norm.kind, f"{self.positions.kind} positions", attention, ffn]
        if isinstance(self.depth, MixtureOfDepths):
            parts.append(f"mixture of depths, {self.depth.gate.kind}")
        return "decoder: " + "; ".join(
            (*parts, "tied head" if self.tied_head else "head of its own")
        )

    def ragged(self) -> str:
        """The key and value that make shapes depend on the data; empty for static shapes."""
        if isinstance(self.ffn, MixtureOfExperts):
            return "model.ffn.kind = moe"
        hard = isinstance(self.depth, MixtureOfDepths) and isinstance(self.depth.gate, HardCapacity)
        return "model.depth.gate.kind = hard" if hard else ""

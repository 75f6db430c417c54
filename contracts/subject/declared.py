"""What the configuration of a run declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

from stackproof.contracts.subject.capability import capability, value

if TYPE_CHECKING:  # commands that judge nothing answer without torch
    from torch import Tensor


class Architecture(TypedDict):
    """The resolved `model` section that spec/architecture.py gives shapes and initial laws of. A
    variant is a mapping with its `kind` and settings.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_seq_len: int
    rope_theta: float
    norm_eps: float
    init_std: float
    dropout: float
    tied_head: bool
    attention: Mapping[str, object]
    ffn: Mapping[str, object]
    norm: Mapping[str, object]
    positions: Mapping[str, object]
    depth: Mapping[str, object]


class Schedule(TypedDict):
    """A learning-rate schedule: warm-up from 0, then `kind` down to `final_lr_frac` of the peak;
    `decay_from` is where its curve begins, peak or start.
    """

    kind: str
    warmup_steps: int
    final_lr_frac: float
    decay_from: str


class UpdateLaw(TypedDict, total=False):
    """How an optimizer updates one parameter. `rule` is adamw, with betas and eps; muon, with what
    follows them; or the class of another optimizer.
    """

    rule: str
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    momentum: float
    nesterov: bool
    ns_steps: int
    lr_scale: str
    dtype: str


class Declared:
    """What the configuration of a run promises."""

    @value
    def seed(self) -> int:
        """The seed of the run."""

    @value
    def architecture(self) -> Architecture:
        """The model's configuration. Such a model is attention, whose masked scores weigh exactly
        0, and maps of single tokens: logits of one shape do not depend on what they may not read,
        bit for bit, unless a router groups tokens.
        """

    @value
    def n_parameters(self) -> int:
        """Number of parameters by the formula of spec/formulas.py."""

    @value
    def tied_head(self) -> bool:
        """Whether head and embedding are declared to be one tensor."""

    @value
    def dtype(self) -> str:
        """Compute precision: float32, bfloat16 or float16."""

    @value
    def schedule(self) -> Schedule:
        """The learning-rate schedule."""

    @value
    def max_steps(self) -> int:
        """Number of optimizer updates."""

    @value
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer update, over all micro-batches."""

    @value
    def max_grad_norm(self) -> float:
        """Global L2 norm that gradients are clipped to."""

    @capability
    def update_law(self, name: str, parameter: Tensor) -> UpdateLaw:
        """How one parameter is updated."""

    @value
    def optimizer_settings(self) -> Mapping[str, float]:
        """Settings that the trainer was given, of `learning_rate`, `weight_decay` and
        `warmup_steps`; without those that it was left to choose.
        """

    @value
    def flops_per_step(self) -> float:
        """Floating-point operations of one update by the formula, attention included."""

    @value
    def attention_flops_per_step(self) -> float:
        """Those of attention's products of positions with positions."""

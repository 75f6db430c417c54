"""The `optim` and `schedule` sections: optimizer and learning-rate schedule."""

from typing import Literal

from pydantic import Field

from stackproof.config.base import Frozen


class AdamW(Frozen):
    """AdamW: decoupled weight decay (arXiv:1711.05101), applied to matrices only."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(
        0.1, ge=0, description="per unit of learning rate; norms are never decayed"
    )
    max_grad_norm: float = Field(
        1.0, gt=0, description="global L2 norm to which gradients are clipped"
    )

    @property
    def dtype(self) -> str:
        """Dtype in which updates are computed."""
        return "float32"

    def peak_lrs(self) -> dict[str, float]:
        """Peak learning rate by parameter group."""
        return {"decay": self.lr, "no-decay": self.lr}

    def state_numbers(self, matrices: int, others: int) -> int:
        """Numbers kept for so many parameters in the matrices of blocks, and so many others."""
        return 2 * (matrices + others)

    def in_float32(self) -> "AdamW":
        """The same optimizer with updates computed in float32."""
        return self


class Muon(Frozen):
    """Muon for the matrices inside blocks (Keller Jordan, 2024), AdamW for all other parameters."""

    kind: Literal["muon"] = "muon"
    lr: float = Field(gt=0, description="peak learning rate of the matrices inside blocks")
    adamw_lr: float = Field(gt=0, description="peak learning rate of all other parameters")
    momentum: float = Field(0.95, ge=0, lt=1, description="momentum (0-1)")
    nesterov: bool = Field(True, description="Nesterov momentum")
    ns_steps: int = Field(
        5, ge=1, le=20, description="Newton-Schulz iterations of one orthogonalisation"
    )
    lr_scale: Literal["match-rms-adamw", "original"] = Field(
        "match-rms-adamw",
        description=(
            "factor by shape: 0.2·√max(rows, columns) (arXiv:2502.16982), or √max(1, rows/columns)"
        ),
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description=(
            "dtype of the orthogonalisation; bfloat16 is faster on a GPU, and much slower on a CPU "
            "without bfloat16 units"
        ),
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="of AdamW")
    beta2: float = Field(0.95, ge=0, lt=1, description="of AdamW")
    eps: float = Field(1e-8, gt=0, description="of AdamW")
    weight_decay: float = Field(
        0.1, ge=0, description="per unit of learning rate; norms are never decayed"
    )
    max_grad_norm: float = Field(
        1.0, gt=0, description="global L2 norm to which gradients are clipped"
    )

    def peak_lrs(self) -> dict[str, float]:
        """Peak learning rate by parameter group."""
        return {"muon": self.lr, "decay": self.adamw_lr, "no-decay": self.adamw_lr}

    def state_numbers(self, matrices: int, others: int) -> int:
        """Numbers kept for so many parameters in the matrices of blocks, and so many others."""
        return matrices + 2 * others

    def in_float32(self) -> "Muon":
        """The same optimizer with updates computed in float32."""
        return self.model_copy(update={"dtype": "float32"})


class Cosine(Frozen):
    """Linear warm-up and a half cosine down to `final_lr_frac` of the peak."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: int = Field(ge=1, description="steps until the peak")
    final_lr_frac: float = Field(
        0.1,
        gt=0,
        le=1,
        description="learning rate of the last step over the peak (0-1); at 0 it would not move",
    )
    decay_from: Literal["peak", "start"] = Field(
        "peak",
        description=(
            "the cosine begins at the end of the warm-up, or at step 0 with the warm-up as a "
            "factor on "
            "it"
        ),
    )


class Wsd(Frozen):
    """WSD: linear warm-up, constant peak, and a decay over the last share of the steps
    (arXiv:2404.06395, arXiv:2405.18392).
    """

    kind: Literal["wsd"] = "wsd"
    warmup_steps: int = Field(ge=1, description="steps until the peak")
    decay_frac: float = Field(
        0.2,
        gt=0,
        le=1,
        description="share of all steps in which the rate decays (0-1), rounded to whole steps",
    )
    decay_shape: Literal["1-sqrt", "linear"] = Field(
        "1-sqrt", description="1 − √x or 1 − x, where x goes from 0 to 1 over the decay"
    )
    final_lr_frac: float = Field(
        0.01,
        gt=0,
        le=1,
        description="learning rate of the last step over the peak (0-1); at 0 it would not move",
    )

    def decay_begins(self, max_steps: int) -> int:
        """The last step at the peak. At least one step decays."""
        return max_steps - max(1, round(self.decay_frac * max_steps))


Optim = AdamW | Muon
Schedule = Cosine | Wsd

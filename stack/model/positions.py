"""Rotary and learned positions.

B batch, N heads, T tokens, D d_model, H rotated width, J = H/2 rotated pairs
"""

import math
from typing import assert_never

import torch
from torch import Tensor, nn

from stackproof.config import LinearScaling, Llama3Scaling, Unscaled
from stackproof.kernels import dispatch
from stackproof.model.init import Embedding

Scaling = Unscaled | LinearScaling | Llama3Scaling


def frequencies(
    width: int, theta: float, scaling: Scaling, device: torch.device | str = "cpu"
) -> Tensor:
    """theta^(−2j/H) for each pair j, scaled as declared: (J,) float64, radians per position."""
    frequency_J = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    match scaling:
        case Unscaled():
            return frequency_J
        case LinearScaling(factor=factor):
            return frequency_J / factor
        case Llama3Scaling():
            return _llama3(frequency_J, scaling)
        case other:
            assert_never(other)


def _llama3(frequency_J: Tensor, s: Llama3Scaling) -> Tensor:
    """Long waves divided by the factor, short ones kept, those between blended by wave count."""
    waves_J = s.original_max_seq_len * frequency_J / (2 * math.pi)
    kept_J = ((waves_J - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return frequency_J * (kept_J + (1 - kept_J) / s.factor)


def rotary_tables(
    width: int,
    max_seq_len: int,
    theta: float,
    scaling: Scaling = Unscaled(),
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position·frequency, each (max_seq_len, J) float32, from float64.

    Positions in half precision collide beyond 256 (huggingface/transformers#29285).
    Source: RoFormer, arXiv:2104.09864.
    """
    position_T = torch.arange(max_seq_len, dtype=torch.float64, device=device)
    angle_TJ = position_T[:, None] * frequencies(width, theta, scaling, device)
    return angle_TJ.cos().float(), angle_TJ.sin().float()


def rotate(x_BNTH: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """Rotate each pair (feature j, feature j + H/2) by its position's angle, paired as in Llama.

    Computes in float32 or wider, returns the dtype of `x_BNTH`. Keeps the length of each pair.
    """
    return dispatch.rope(x_BNTH, cos_TJ, sin_TJ)


class Rotary(nn.Module):
    """Rotary tables as buffers. Checkpoints omit them: they follow from the configuration."""

    def __init__(self, width: int, max_seq_len: int, theta: float, scaling: Scaling = Unscaled()):
        super().__init__()
        self.width, self.max_seq_len, self.theta, self.scaling = width, max_seq_len, theta, scaling
        self.register_buffer("cos", torch.empty(max_seq_len, width // 2), persistent=False)
        self.register_buffer("sin", torch.empty(max_seq_len, width // 2), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Compute the tables; needed after a move from the meta device to real memory."""
        if self.cos.is_meta:
            return
        cos_TJ, sin_TJ = rotary_tables(self.width, self.max_seq_len, self.theta, self.scaling)
        self.cos.copy_(cos_TJ)
        self.sin.copy_(sin_TJ)

    def tables(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows `start … stop−1` of both tables, each (T, J)."""
        return self.cos[start:stop], self.sin[start:stop]

    def at(self, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of both tables at each token's position, each (B, 1, T, J): for all heads."""
        return self.cos[position_BT][:, None], self.sin[position_BT][:, None]

    def added(self, x_BTD: Tensor, position_BT: Tensor) -> Tensor:
        """The embedding unchanged: positions are applied in attention."""
        return x_BTD


class Learned(Embedding):
    """A learned vector per position, added to the embedding. Source: GPT-2."""

    def reset(self) -> None:
        """Nothing to compute: the table is learned."""

    def tables(self, start: int, stop: int) -> None:
        return None

    def at(self, position_BT: Tensor) -> None:
        return None

    def added(self, x_BTD: Tensor, position_BT: Tensor) -> Tensor:
        """Embedding plus the vectors of the positions, (B, T, D)."""
        return x_BTD + self(position_BT)

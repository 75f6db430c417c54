"""Rotary positions. B batch, N heads, T tokens, H head_dim, J = H/2 rotated pairs."""

import torch
from torch import Tensor, nn


def rotary_tables(head_dim: int, max_seq_len: int, theta: float, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosine and sine of position·theta^(−2j/H), each (max_seq_len, H/2) float32, computed in float64 and rounded once.

    Positions in half precision collide beyond 256 (huggingface/transformers#29285). Source: RoFormer, arXiv:2104.09864.
    """
    frequency_J = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle_TJ = torch.arange(max_seq_len, dtype=torch.float64, device=device)[:, None] * frequency_J
    return angle_TJ.cos().float(), angle_TJ.sin().float()


def rotate(x_BNTH: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """Turn each pair (feature j, feature j + H/2) by its position's angle; the half-split pairing of Llama checkpoints.

    Computes in float32 or wider, returns the dtype of `x_BNTH`. Keeps each pair's length (property-tested).
    """
    a, b = x_BNTH.chunk(2, dim=-1)
    return torch.cat((a * cos_TJ - b * sin_TJ, b * cos_TJ + a * sin_TJ), dim=-1).to(x_BNTH.dtype)


class Rotary(nn.Module):
    """Holds the tables as buffers. They follow from the configuration, so they are not stored in checkpoints."""

    def __init__(self, head_dim: int, max_seq_len: int, theta: float):
        super().__init__()
        self.head_dim, self.max_seq_len, self.theta = head_dim, max_seq_len, theta
        self.register_buffer("cos", torch.empty(max_seq_len, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(max_seq_len, head_dim // 2), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Compute the tables afresh; needed whenever the module was moved to real memory from the meta device."""
        if self.cos.is_meta:
            return
        cos_TJ, sin_TJ = rotary_tables(self.head_dim, self.max_seq_len, self.theta)
        self.cos.copy_(cos_TJ)
        self.sin.copy_(sin_TJ)

    def forward(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows `start … stop−1` of both tables, each (T, H/2)."""
        return self.cos[start:stop], self.sin[start:stop]

    def at(self, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of both tables at each token's own position (int64), each (B, 1, T, H/2): one for all heads."""
        return self.cos[position_BT][:, None], self.sin[position_BT][:, None]

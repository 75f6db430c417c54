"""How a model knows where a token stands. B batch, T tokens, D d_model."""

from typing import assert_never

from torch import Tensor, nn

from stackproof.config import DifferentialAttention, LearnedPositions, ModelConfig, RotaryPositions
from stackproof.model.init import Embedding
from stackproof.model.rotary import Rotary


class Learned(Embedding):
    """A learned vector per position, added to the embedding. Source: GPT-2."""

    def reset(self) -> None:
        """Nothing follows from the configuration: all of it is learned."""

    def tables(self, start: int, stop: int) -> None:
        return None

    def at(self, position_BT: Tensor) -> None:
        return None

    def added(self, x_BTD: Tensor, position_BT: Tensor) -> Tensor:
        """Embedding plus the vectors of the positions, (B, T, D)."""
        return x_BTD + self(position_BT)


def make_positions(cfg: ModelConfig) -> nn.Module:
    """Rotary tables or learned vectors; differential heads rotate each
    of their halves by itself.
    """
    match cfg.positions:
        case RotaryPositions(scaling=scaling):
            parts = 2 if isinstance(cfg.attention, DifferentialAttention) else 1
            return Rotary(cfg.head_dim // parts, cfg.max_seq_len, cfg.rope_theta, scaling)
        case LearnedPositions():
            return Learned(cfg.max_seq_len, cfg.d_model)
        case other:
            assert_never(other)

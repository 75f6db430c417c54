"""Running a block again in the backward instead of keeping what its forward made.
B batch, T tokens, D d_model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x_BTD: Tensor, *context: Any, recompute: bool) -> Tensor:
    """`block(x_BTD, *context)`. With `recompute`, in training, only the input is kept and the
    backward runs the block a second time.

    The second run draws the same dropout and works under the same autocast, so the gradients are
    the same bit for bit. What a block reports must be taken before the backward, which makes it
    report again. Source: arXiv:1604.06174.
    """
    if recompute and block.training and torch.is_grad_enabled():
        return checkpoint(block, x_BTD, *context, use_reentrant=False)
    return block(x_BTD, *context)

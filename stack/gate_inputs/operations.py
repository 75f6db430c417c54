"""Floating-point operations of a step: by formula, and counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stackproof.config import RunConfig
from stackproof.kernels import dispatch
from stackproof.spec.formulas import flops_per_token
from stackproof.train import losses
from stackproof.train.rng import generator

MAX_COUNTED_TOKENS = 128
MATRIX_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


def flops_per_step(cfg: RunConfig, vocab_size: int) -> float:
    """Floating-point operations of the matrix products of one optimizer step, attention included,
    by the formula.
    """
    return _per_token(cfg, vocab_size, cfg.model.max_seq_len) * cfg.train.tokens_per_step


def _per_token(cfg: RunConfig, vocab_size: int, seq_len: int) -> int:
    return flops_per_token(cfg.model.model_dump(), vocab_size, seq_len)


def flops_ingredients(
    cfg: RunConfig, vocab_size: int, build: Callable[[], nn.Module], device: torch.device
) -> dict[str, Any]:
    """What runtime.flops looks at."""
    declared = flops_per_step(cfg, vocab_size)
    per_token = _per_token(cfg, vocab_size, cfg.model.max_seq_len) - _per_token(cfg, vocab_size, 0)
    return {
        "declared_flops_per_step": declared,
        "attention_flops_per_step": per_token * cfg.train.tokens_per_step,
        "tokens_per_step": cfg.train.tokens_per_step,
        "matrix_flops": lambda: matrix_flops(cfg, vocab_size, build(), device),
    }


def matrix_flops(
    cfg: RunConfig, vocab_size: int, model: nn.Module, device: torch.device
) -> tuple[int, int]:
    """Operations of the matrix products that torch runs in one forward and backward of `model` in
    evaluation mode: (operations, tokens).

    Two rows; linear layers and the head by torch's own kernels,
    since a count does not see into others.
    """
    seq_len = min(cfg.model.max_seq_len, MAX_COUNTED_TOKENS // 2)
    ids = torch.randint(0, vocab_size, (2, seq_len + 1), generator=generator(cfg.seed, "flops")).to(
        device
    )
    model.eval()
    with (
        dispatch.using(linear="torch", linear_cross_entropy="torch"),
        FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter,
    ):
        x_BTD, _ = model.hidden_states(ids[:, :-1])
        losses.linear_cross_entropy_sum(x_BTD, model.head_weight, ids[:, 1:]).backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in MATRIX_PRODUCTS), 2 * seq_len


def _added_product(
    total: Tensor, left: tuple[int, int], right: tuple[int, int], *rest: Any, **options: Any
) -> int:
    """Operations of `total += left @ right`, by shapes: two per multiply-add."""
    return 2 * left[0] * left[1] * right[1]


_IN_PLACE = {torch.ops.aten.addmm_: _added_product}

"""Floating-point operations: of a step by the formula, and of the device in a second."""

import time

import torch

from stackproof.config import RunConfig
from stackproof.kernels import dispatch
from stackproof.spec.formulas import flops_per_token


def flops_per_step(cfg: RunConfig, vocab_size: int) -> float:
    """Floating-point operations of the matrix products of one optimizer step, attention included,
    by the formula.
    """
    per_token = flops_per_token(cfg.model.model_dump(), vocab_size, cfg.model.max_seq_len)
    return per_token * cfg.train.tokens_per_step


def attention_flops_per_step(cfg: RunConfig, vocab_size: int) -> float:
    """Those of attention's products of positions with positions."""
    model, seq_len = cfg.model.model_dump(), cfg.model.max_seq_len
    in_attention = flops_per_token(model, vocab_size, seq_len) - flops_per_token(
        model, vocab_size, 0
    )
    return in_attention * cfg.train.tokens_per_step


def probe_peak_flops(device: torch.device) -> float:
    """Floating-point operations per second of a large float32 (GPU: bfloat16) product by the kernel
    of linear layers, best of ten.
    """
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(10):
        _wait(device)
        started = time.perf_counter()
        dispatch.linear(a, a)
        _wait(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

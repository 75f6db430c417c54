"""What runs before step 1: the preflight gates, and a measurement of the device's peak rate."""

import time
from collections.abc import Callable

import torch

from stackproof.config import RunConfig
from stackproof.contracts.keeper import Gatekeeper
from stackproof.data.prepare import Dataset
from stackproof.gate_inputs.preflight import gather
from stackproof.kernels import dispatch


def preflight(
    cfg: RunConfig,
    dataset: Dataset,
    device: torch.device,
    keeper: Gatekeeper,
    progress: Callable[..., None],
    *,
    n_eval_batches: int | None,
) -> int:
    """Run every preflight gate. torch's random state is the same afterwards.
    Returns the number of held-out batches to use.

    Raises GateFailed for the first red gate that halts, after all were asked.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        n_eval_batches, ingredients = gather(cfg, dataset, device, n_eval_batches=n_eval_batches)
        keeper.preflight(ingredients, progress)
    return n_eval_batches


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

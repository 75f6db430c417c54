"""Whether a processor has units for a half-precision type, found out by using it."""

import time

import torch

from stackproof.spec.errors import EnvironmentUnfit

SIZE, ROUNDS = 384, 5
# a processor with units reaches 1 to 4 times the float32 rate, one without them 0.04 to 0.1
LEAST_SHARE = 0.5


def product_s(dtype: torch.dtype) -> float:
    """Shortest of a few square matrix products on the CPU, seconds."""
    a, best = torch.ones(SIZE, SIZE, dtype=dtype), float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return best


def refuse_emulated(dtype: torch.dtype | None, device: torch.device, key: str) -> None:
    """Raise EnvironmentUnfit where the device only emulates what `key` asks for: training would be
    ten times slower and say nothing.
    """
    if dtype is None:
        return
    if device.type == "cuda":
        if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise EnvironmentUnfit(
                f"{torch.cuda.get_device_name(device)} has no units for bfloat16",
                allowed="compute capability 8.0 and above",
                next_step=f"--set {key}=float16 where it takes that, or float32",
            )
        return
    share = product_s(torch.float32) / product_s(dtype)
    if share < LEAST_SHARE:
        name = str(dtype).removeprefix("torch.")
        raise EnvironmentUnfit(
            f"this processor has no units for {name}",
            value=f"its products run at {share:.2g} times the float32 rate",
            allowed=f"at least {LEAST_SHARE:g} times",
            next_step=f"--set {key}=float32, or a GPU",
        )

"""The device of a run: which one, with which kernels, and the floating-point operations of a step
and of a second on it.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from stackproof.config import RunConfig
from stackproof.data.prepare import cache_directory
from stackproof.kernels import choice, dispatch, measured
from stackproof.spec.errors import EnvironmentUnfit
from stackproof.spec.formulas import flops_per_token

OTHER_KERNELS = (
    "use a machine that has it, or stack train --fork DIR, which chooses kernels for this one"
)
PRODUCT_SIZE, PRODUCT_ROUNDS = 384, 5
PROCESS_STATUS = Path("/proc/self/status")
# Of the float32 rate: native units reach 1 to 4 times that rate, emulation 0.04 to 0.1.
LEAST_SHARE = 0.5


def resolve_device(name: str) -> torch.device:
    """The device of a name; `auto` takes the GPU if there is one.
    Raises EnvironmentUnfit if a named GPU is missing.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise EnvironmentUnfit(
            "the device is cuda, and torch finds no CUDA device",
            value=f"torch {torch.__version__}",
            next_step="--device cpu, or see stack doctor",
        )
    # cuBLAS is deterministic only with a fixed workspace, and reads this when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory that this process has held so far, bytes: allocated on a GPU, resident on a CPU;
    None where the system does not state it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not PROCESS_STATUS.is_file():
        return None
    # Not ru_maxrss: that of a forked process begins with the size of its parent.
    lines = PROCESS_STATUS.read_text().splitlines()
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return next(found, None)


@contextmanager
def kernels_of(
    cfg: RunConfig, device: torch.device, recorded: Mapping[str, object] | None = None
) -> Iterator[None]:
    """Use the kernels of a run on its device until the block ends.

    With `recorded`, the environment of a record or of run.json, those that it names; otherwise
    those of `train.kernels`, where auto also looks at the comparison made on this machine.
    Raises EnvironmentUnfit where one of them cannot run here.
    """
    if recorded is not None:
        choices = choice.of_record(recorded, device, OTHER_KERNELS)
    else:
        choices = choice.of_config(
            cfg.train.kernels,
            device,
            dtype=cfg.train.dtype,
            compiled=cfg.train.compile,
            measurement=measured.read(cache_directory(), choice.device_name(device)),
        )
    with dispatch.using_choices(choices, device):
        yield


# --- floating-point operations --------------------------------------------------------------------


def flops_per_step(cfg: RunConfig, vocab_size: int) -> float:
    """Floating-point operations of the matrix products of one optimizer step, attention included,
    by the formula.
    """
    per_token = flops_per_token(cfg.model.model_dump(), vocab_size, cfg.model.max_seq_len)
    return per_token * cfg.train.tokens_per_step


def attention_flops_per_step(cfg: RunConfig, vocab_size: int) -> float:
    """Those of attention's products of positions with positions."""
    model = cfg.model.model_dump()
    with_attention, without = (
        flops_per_token(model, vocab_size, seq_len) for seq_len in (cfg.model.max_seq_len, 0)
    )
    return (with_attention - without) * cfg.train.tokens_per_step


def probe_peak_flops(device: torch.device, cpu_size: int = 1024) -> float:
    """Floating-point operations per second of a large float32 (GPU: bfloat16) product by the kernel
    of linear layers, best of ten. On a CPU it has `cpu_size` rows and columns.
    """
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (cpu_size, torch.float32)
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


# --- half precision -------------------------------------------------------------------------------


def product_s(dtype: torch.dtype) -> float:
    """Shortest time of a few square matrix products on the CPU, seconds."""
    a, best = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype), float("inf")
    for _ in range(PRODUCT_ROUNDS):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return best


def refuse_emulated(dtype: torch.dtype | None, device: torch.device, key: str) -> None:
    """Raise EnvironmentUnfit if the device only emulates the type that `key` sets:
    training would be ten times slower.
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

"""Memory of a run: predicted from its configuration, required to be free, and kept in the heap.

F d_ff, D d_model, N and K heads, H head_dim. Importable without torch, for `stack train --dry-run`.
"""

import ctypes
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from stackproof.config import ModelConfig, RunConfig
from stackproof.kernels import HEAD_CHUNK_BYTES
from stackproof.spec.errors import EnvironmentUnfit
from stackproof.spec.formulas import parameter_count, saved_per_token

if TYPE_CHECKING:
    import torch

FLOAT, HALF = 4, 2
# Fragmentation of the heap, and packing buffers of matrix products.
HEAP_SHARE, LIBRARIES_BYTES = 1.15, 32 * 2**20
# Measured 47 at 58 M parameters on a CPU: a state beside references in float64.
PREFLIGHT_BYTES_PER_PARAMETER = 50
COPY_BYTES_PER_PARAMETER = 12  # weight and two moments, of a checkpoint written in the background

M_TRIM_THRESHOLD, M_MMAP_MAX, NEVER = -1, -4, -1  # malloc.h of the GNU C library
MADV_HUGEPAGE, HUGE_PAGE_BYTES = 14, 2 * 2**20  # sys/mman.h of Linux
KEPT = "glibc, heap kept"
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def predict_bytes(cfg: RunConfig, vocab_size: int) -> dict[str, int]:
    """Peak memory that training adds to a process with opened data, bytes, by part;
    `copy` is in host memory.

    Measured peaks were 0.75 to 1.15 times as much, over sizes and variants: see
    benchmarks/memory.py. `preflight` is needed only before step 1, so the larger of both must fit
    on a CPU.
    """
    n_params = parameter_count(cfg.model.model_dump(), vocab_size)
    tables = vocab_size * cfg.model.d_model * (1 if cfg.model.tied_head else 2)
    parts = {
        "weights": FLOAT * n_params,
        "moments": FLOAT * cfg.optim.state_numbers(matrices=n_params - tables, others=tables),
        "gradients": FLOAT * n_params,
        **passing_bytes(cfg, vocab_size, cfg.train.micro_batch_size),
    }
    copy = COPY_BYTES_PER_PARAMETER * n_params if cfg.checkpoint.async_save else 0
    return parts | {
        "peak": peak_bytes(parts),
        "preflight": PREFLIGHT_BYTES_PER_PARAMETER * n_params,
        "copy": copy,
    }


def passing_bytes(cfg: RunConfig, vocab_size: int, rows: int, *, tensor: int = 1) -> dict[str, int]:
    """What a micro-step of this many rows holds beside weights, gradients and moments, bytes:
    `activations` and `head`. The ranks of a tensor group divide heads, inner features, vocabulary
    and the residual stream; each keeps the inputs of both branches whole.
    """
    m, declared = cfg.model, cfg.model.model_dump()
    n_tokens = rows * m.max_seq_len
    whole_inputs = 2 * (tensor - 1) * m.d_model
    saved = (HALF if cfg.train.dtype != "float32" else FLOAT) * (
        saved_per_token(declared) + whole_inputs
    )
    match cfg.train.activation_checkpointing:
        case "none":
            blocks = m.n_layers * saved
        case "blocks":
            blocks = m.n_layers * FLOAT * m.d_model + saved
    activations = n_tokens * (blocks // tensor + 3 * FLOAT * m.d_model)
    passing = FLOAT * n_tokens * (3 * m.d_ff // tensor + 4 * m.d_model)
    logits = min(FLOAT * n_tokens * vocab_size, HEAD_CHUNK_BYTES)
    head = logits + 2 * FLOAT * vocab_size * m.d_model
    return {"activations": activations + passing, "head": head // tensor}


def peak_bytes(parts: Mapping[str, int]) -> int:
    """Peak of a process that holds these parts at once, bytes."""
    return round(HEAP_SHARE * sum(parts.values())) + LIBRARIES_BYTES


def available_bytes(device: "torch.device") -> int | None:
    """Free memory of the device, bytes; None where the system does not report it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return host_bytes()


def host_bytes() -> int | None:
    """Free memory of the host, bytes; None where the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(
        (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None
    )


def require_room(cfg: RunConfig, vocab_size: int, device: "torch.device") -> int:
    """Bytes the run needs on `device`.
    Raises EnvironmentUnfit if they are not free, before anything is built.
    """
    predicted, free = predict_bytes(cfg, vocab_size), available_bytes(device)
    # Elsewhere the copy is in host memory; the peak of preflight is measured on a CPU only.
    on_cpu = device.type == "cpu"
    training = predicted["peak"] + (predicted["copy"] if on_cpu else 0)
    preflight = predicted["preflight"] if on_cpu else 0
    needed = max(training, preflight)
    if free is not None and needed > free:
        rows = f"for {cfg.train.micro_batch_size} rows of {cfg.model.max_seq_len} tokens"
        purpose = rows if training >= preflight else "to check it before step 1"
        raise EnvironmentUnfit(
            "the run does not fit into memory",
            value=f"about {needed / 2**30:.1f} GiB needed {purpose}",
            allowed=f"{free / 2**30:.1f} GiB are free on {device}",
            next_step="lower train.micro_batch_size (tokens_per_step may stay) or the model, "
            "or train.activation_checkpointing=blocks",
        )
    return needed


def model_bytes(m: ModelConfig, vocab_size: int) -> int:
    """Memory of a model for inference, float32: its parameters, and the tables of rotary positions,
    which are computed in float64.
    """
    tables = 3 * 2 * FLOAT * m.max_seq_len * m.head_dim if m.positions.kind == "rotary" else 0
    return FLOAT * parameter_count(m.model_dump(), vocab_size) + tables


def require_free(n_bytes: int, what: str, device: "torch.device | None" = None) -> None:
    """Raises EnvironmentUnfit if this much memory of the device, by default of the host, is not
    free, before it is taken.
    """
    free = available_bytes(device) if device else host_bytes()
    if free is not None and n_bytes > free:
        raise EnvironmentUnfit(
            f"{what} does not fit into memory",
            value=f"{n_bytes} bytes ({n_bytes / 2**30:.1f} GiB) needed",
            allowed=f"{free} bytes ({free / 2**30:.1f} GiB) are free",
            next_step="use a machine with more memory, or a smaller model",
        )


# --- the C allocator: fresh pages cost more than the arithmetic done on them ----------------------


@cache
def keep_heap() -> str:
    """Keep freed memory in the process instead of returning it to the system.
    Returns what was done, for the record.

    By default the GNU C library maps every block above 32 MiB again and returns the top of the
    heap, so each step pays for zeroed pages. The peak stays that of a step. Other C libraries are
    left unchanged.
    """
    if platform.libc_ver()[0] != "glibc":
        return "as shipped"
    mallopt = ctypes.CDLL(None).mallopt
    done = mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER)
    return KEPT if done else "as shipped: mallopt refused"


def lay_in_huge_pages(n_bytes: int) -> str:
    """Request 2 MiB pages for the next `n_bytes` of a kept heap.
    Returns what was done, for the record.

    A step walks through all its activations, and with 4 KiB pages many reads miss the TLB.
    Only address space is reserved here; memory is taken at its first use.
    """
    if keep_heap() != KEPT or platform.system() != "Linux":
        return "pages as shipped"
    if not SWITCH.exists() or "[never]" in SWITCH.read_text():
        return "pages as shipped: the system grants no large ones"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = (
        [ctypes.c_void_p],
        [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
    )
    block = libc.malloc(n_bytes)
    if not block:
        return f"pages as shipped: no room for {n_bytes} bytes"
    first = -(-block // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    size = max(0, block + n_bytes - first) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    refused = libc.madvise(first, size, MADV_HUGEPAGE)
    libc.free(block)  # it stays at the top of the heap, from which the next blocks are cut
    return (
        "pages as shipped: madvise refused"
        if refused
        else f"{size // 2**20} MiB advised to lie in huge pages"
    )

"""How much memory a run will need, from its configuration."""

from pathlib import Path
from typing import TYPE_CHECKING

from stackproof.config import RunConfig
from stackproof.kernels import HEAD_CHUNK_BYTES
from stackproof.spec.errors import EnvironmentUnfit
from stackproof.spec.formulas import parameter_count, saved_per_token

if TYPE_CHECKING:
    import torch

FLOAT, HALF = 4, 2
# pieces between blocks that nothing fits into, and packing buffers of matrix products
HEAP_SHARE, LIBRARIES_BYTES = 1.15, 32 * 2**20


# measured 47 at 58 M parameters on a CPU: a state beside references in float64
PREFLIGHT_BYTES_PER_PARAMETER = 50
COPY_BYTES_PER_PARAMETER = 12


def predict_bytes(cfg: RunConfig, vocab_size: int) -> dict[str, int]:
    """Peak memory that training adds to a process which has opened its data, bytes, and what it is
    made of; `copy` is in host memory.

    Measured peaks were 0.75 to 1.15 times as much, over sizes and variants: see
    benchmarks/memory.py. `preflight` comes and goes before step 1, so the larger of both is what
    must fit on a CPU.
    """
    m, declared = cfg.model, cfg.model.model_dump()
    n_params = parameter_count(declared, vocab_size)
    n_tokens = cfg.train.micro_batch_size * m.max_seq_len
    saved = (HALF if cfg.train.dtype != "float32" else FLOAT) * saved_per_token(declared)
    match cfg.train.activation_checkpointing:
        case "none":
            blocks = m.n_layers * saved
        case "blocks":
            blocks = m.n_layers * FLOAT * m.d_model + saved
    activations = n_tokens * (blocks + 3 * FLOAT * m.d_model)
    logits = min(FLOAT * n_tokens * vocab_size, HEAD_CHUNK_BYTES)
    head = logits + 2 * FLOAT * vocab_size * m.d_model
    state = FLOAT * n_params
    passing = FLOAT * n_tokens * (3 * m.d_ff + 4 * m.d_model)
    tables = FLOAT * vocab_size * m.d_model * (1 if m.tied_head else 2)
    # Muon keeps one per matrix
    moments = 2 * state if cfg.optim.kind == "adamw" else state + tables
    parts = {
        "weights": state,
        "moments": moments,
        "gradients": state,
        "activations": activations + passing,
        "head": head,
    }
    peak = round(HEAP_SHARE * sum(parts.values())) + LIBRARIES_BYTES
    copy = COPY_BYTES_PER_PARAMETER * n_params if cfg.checkpoint.writing == "behind" else 0
    return parts | {
        "peak": peak,
        "preflight": PREFLIGHT_BYTES_PER_PARAMETER * n_params,
        "copy": copy,
    }


def available_bytes(device: "torch.device") -> int | None:
    """Memory that is free now, bytes; None where the system does not say."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(
        (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None
    )


def require_room(cfg: RunConfig, vocab_size: int, device: "torch.device") -> int:
    """Bytes the run will take on `device`.
    Raises EnvironmentUnfit where they are not there, before anything is built.
    """
    predicted, there = predict_bytes(cfg, vocab_size), available_bytes(device)
    # elsewhere the copy and the references of preflight lie in host memory
    on_cpu = device.type == "cpu"
    training = predicted["peak"] + (predicted["copy"] if on_cpu else 0)
    preflight = predicted["preflight"] if on_cpu else 0
    needed = max(training, preflight)
    if there is not None and needed > there:
        rows = f"for {cfg.train.micro_batch_size} rows of {cfg.model.max_seq_len} tokens"
        purpose = rows if training >= preflight else "to check it before step 1"
        raise EnvironmentUnfit(
            "the run does not fit into memory",
            value=f"about {needed / 2**30:.1f} GiB needed {purpose}",
            allowed=f"{there / 2**30:.1f} GiB are free on {device}",
            next_step=(
                "lower train.micro_batch_size (tokens_per_step may stay) or the model, or "
                "train.activation_checkpointing=blocks"
            ),
        )
    return needed

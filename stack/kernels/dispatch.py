"""Which kernel runs on which device, and why. The model calls kernels only through here.

B batch, N query heads, K key/value heads, T queries, S keys, H head_dim, D d_model, F d_ff, R rows
(positions), V vocabulary

Each operation has candidates with the same arguments. Chosen is what `using` names; else what was
measured to be fastest on this device (`MEASURED`, each line with the record it rests on); else
torch's own.
"""

import difflib
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stackproof.kernels import attention as torch_attention
from stackproof.kernels import cross_entropy, eager, launch, onednn, parity
from stackproof.spec.errors import EnvironmentUnfit, UsageError


@dataclass(frozen=True)
class Plain:
    """A way to do an operation without Triton, what a record calls it, and why it cannot run on a
    device (empty if it can).
    """

    function: Callable
    title: str
    why_not: Callable[[torch.device], str] = lambda device: ""


def cpu_maker() -> str:
    """Who made the processor, as it says itself; where the system does not show that,
    its family.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")),
        platform.machine(),
    )


def _not_on_cpu(device: torch.device) -> str:
    return "" if device.type == "cpu" else f"it is for the CPU, not for {device.type}"


def _no_onednn(device: torch.device) -> str:
    return _not_on_cpu(device) or onednn.WHY_NOT


@dataclass(frozen=True)
class Triton:
    """A Triton kernel: the module beside this one that holds a function of the operation's name,
    imported only when it is chosen.
    """

    module: str
    title: str


@dataclass(frozen=True)
class Fastest:
    """The winner of a comparison on one kind of device, and the id of the
    benchmark record that shows it.
    """

    kernel: str
    record: str


TORCH, LIBRARY, CHUNKS, ONEDNN, TRITON = "torch", "library", "chunks", "onednn", "triton"
CANDIDATES: dict[str, dict[str, Plain | Triton]] = {
    "linear": {
        TORCH: Plain(F.linear, "torch.nn.functional.linear"),
        ONEDNN: Plain(
            onednn.linear, "oneDNN, small products by torch.nn.functional.linear", _no_onednn
        ),
    },
    "attention": {
        TORCH: Plain(torch_attention.attention, "torch.scaled_dot_product_attention"),
        CHUNKS: Plain(
            partial(torch_attention.attention, chunks=True),
            "torch products of 64 queries at a time, short or few rows by "
            "torch.scaled_dot_product_attention",
            _not_on_cpu,
        ),
        TRITON: Triton("flash_attention", "triton flash attention"),
    },
    "rms_norm": {
        TORCH: Plain(eager.rms_norm, "torch, derivative written out"),
        TRITON: Triton("rms_norm", "triton rms_norm"),
    },
    "rope": {
        TORCH: Plain(eager.rope, "torch, derivative written out"),
        TRITON: Triton("rope", "triton rope"),
    },
    "swiglu": {
        TORCH: Plain(eager.swiglu, "torch, derivative written out"),
        TRITON: Triton("swiglu", "triton swiglu"),
    },
    "linear_cross_entropy": {
        TORCH: Plain(
            cross_entropy.linear_cross_entropy, "torch, rows in chunks through one buffer"
        ),
        LIBRARY: Plain(
            eager.library_linear_cross_entropy,
            "torch.nn.functional.linear_cross_entropy",
            lambda device: eager.why_no_library_linear_cross_entropy(),
        ),
        ONEDNN: Plain(
            partial(cross_entropy.linear_cross_entropy, by_onednn=True),
            "oneDNN, rows in chunks",
            _no_onednn,
        ),
        TRITON: Triton("linear_cross_entropy", "triton linear_cross_entropy"),
    },
    "clip": {
        TORCH: Plain(eager.clip, "torch.nn.utils.get_total_norm"),
        TRITON: Triton("clip", "triton clip"),
    },
    "adamw": {
        TORCH: Plain(eager.adamw, "torch, over lists of tensors"),
        TRITON: Triton("adamw", "triton adamw"),
    },
}
# Operations that a training step takes from here; clipping and AdamW are torch's own,
# `stackproof.train.optimizer`.
TRAINED = ("linear", "attention", "rms_norm", "rope", "swiglu", "linear_cross_entropy")
FUSED_BY_COMPILER = ("rms_norm", "rope", "swiglu")
CPU_NAME = f"{cpu_maker()} {torch.backends.cpu.get_cpu_capability()}"
# (name of the device, operation) -> winner.
# The only place to edit when a benchmark has been recorded.
MEASURED: dict[tuple[str, str], Fastest] = {
    ("AuthenticAMD AVX512", "linear"): Fastest(ONEDNN, "benchmark-20261122T091225Z-f056d3d8"),
    ("AuthenticAMD AVX512", "attention"): Fastest(CHUNKS, "benchmark-20261122T091225Z-f056d3d8"),
    ("AuthenticAMD AVX512", "linear_cross_entropy"): Fastest(
        ONEDNN, "benchmark-20261122T091225Z-f056d3d8"
    ),
}

_by_hand: dict[str, str] = {}


# ---- the operations


def linear(x: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """A linear layer over the last axis; same arguments as
    `stackproof.kernels.reference.linear`.
    """
    return kernel("linear", x.device)(x, weight_MD, bias_M)


def attention(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    start_BS: Tensor | None = None,
    window: int | None = None,
    mask_B1TS: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of the last T of S positions; same arguments as
    `stackproof.kernels.reference.attention`.

    `mask_B1TS` stands for start and window where it was made once for all layers, or where visible
    keys are no range: never Triton's.
    """
    if mask_B1TS is not None:
        chunks = choose("attention", q_BNTH.device)[0] == CHUNKS
        if chunks:
            kernel("attention", q_BNTH.device)  # refuses a device that it is not for
        return torch_attention.document_attention(
            q_BNTH, k_BKSH, v_BKSH, mask_B1TS, scale=scale, chunks=chunks
        )
    return kernel("attention", q_BNTH.device)(
        q_BNTH, k_BKSH, v_BKSH, start_BS=start_BS, window=window, scale=scale
    )


def rms_norm(
    x_BTD: Tensor, weight_D: Tensor, eps: float, residual_BTD: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalisation, with the residual sum before it if given; same arguments as
    `stackproof.kernels.reference.rms_norm`.
    """
    return kernel("rms_norm", x_BTD.device)(x_BTD, weight_D, eps, residual_BTD)


def rope(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; same arguments as `stackproof.kernels.reference.rope`."""
    return kernel("rope", x_BNTH.device)(x_BNTH, cos, sin)


def swiglu(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """silu(gate)·up; same arguments as `stackproof.kernels.reference.swiglu`."""
    return kernel("swiglu", gate_BTF.device)(gate_BTF, up_BTF)


def linear_cross_entropy(
    x_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sums of nats and of z-loss; same arguments as
    `stackproof.kernels.reference.linear_cross_entropy`.
    """
    loss = kernel("linear_cross_entropy", x_RD.device)
    return loss(
        x_RD, weight_VD, labels_R, ignore_index=ignore_index, softcap=softcap, z_loss=z_loss
    )


def clip(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Clip by the global norm, in place; same arguments as `stackproof.kernels.reference.clip`."""
    return kernel("clip", gradients[0].device if gradients else "cpu")(gradients, max_norm)


def adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    **numbers: object,
) -> None:
    """One AdamW step, in place; same arguments as `stackproof.kernels.reference.adamw`."""
    update = kernel("adamw", parameters[0].device if parameters else "cpu")
    update(parameters, gradients, first_moments, second_moments, **numbers)


def takes_masks(device: torch.device | str) -> bool:
    """Whether the attention of this device wants a mask made once for all layers,
    and not the ranges it stands for.
    """
    return choose("attention", device)[0] != TRITON


def document_mask(start_BT: Tensor) -> Tensor:
    """The mask of packed rows; same arguments as `stackproof.kernels.reference.document_mask`."""
    return torch_attention.document_mask(start_BT)


def window_mask(start: int, stop: int, window: int, device: torch.device | str) -> Tensor:
    """The mask of a sliding window; same arguments as
    `stackproof.kernels.attention.window_mask`.
    """
    return torch_attention.window_mask(start, stop, window, device)


# ---- the choice


@contextmanager
def using(**kernels: str) -> Iterator[None]:
    """Choose kernels by hand, `using(attention="triton")`, in the whole
    process until the block ends.

    Raises UsageError for an unknown operation or kernel, EnvironmentUnfit where it cannot run,
    IntegrityError for a Triton kernel whose source is not the one that passed its parity tests.
    """
    for op, name in kernels.items():
        require(op, name)
    before = dict(_by_hand)
    _by_hand.update(kernels)
    try:
        yield
    finally:
        _by_hand.clear()
        _by_hand.update(before)


def require(op: str, name: str) -> None:
    """Refuse a choice that is unknown or that no device of this machine can run."""
    if op not in CANDIDATES:
        near = ", ".join(difflib.get_close_matches(op, CANDIDATES, cutoff=0)[:3])
        raise UsageError(
            f"{op} is not an operation with kernels",
            value=f"{op}={name}",
            allowed=f"nearest: {near}",
        )
    if name not in CANDIDATES[op]:
        raise UsageError(
            f"{op} has no kernel of this name",
            value=f"{op}={name}",
            allowed=", ".join(CANDIDATES[op]),
        )
    reasons = [
        why_not(op, name, device)
        for device in (["cuda"] if torch.cuda.is_available() else []) + ["cpu"]
    ]
    if all(reasons):
        raise EnvironmentUnfit(
            f"{op}: the kernel {name} cannot run here",
            value=reasons[0],
            allowed=", ".join(CANDIDATES[op]),
        )
    if isinstance(CANDIDATES[op][name], Triton):
        parity.require(op)


def why_not(op: str, name: str, device: torch.device | str) -> str:
    """Why a candidate cannot run on `device`; empty if it can.
    Dtypes and shapes are for the kernel to refuse.
    """
    match CANDIDATES[op][name]:
        case Triton():
            return launch.why_not(device)
        case Plain(why_not=reason):
            return reason(torch.device(device))


def choose(op: str, device: torch.device | str) -> tuple[str, str]:
    """The name of the kernel for `op` on `device`, and the reason."""
    if op in _by_hand:
        return _by_hand[op], "chosen by hand"
    device = torch.device(device) if isinstance(device, str) else device
    if device.type not in ("cpu", "cuda"):
        return TORCH, f"no kernel of our own for {device.type}"
    fastest = MEASURED.get((device_name(device), op))
    if fastest is None:
        return TORCH, f"not measured on {device_name(device)} yet"
    if unfit := why_not(op, fastest.kernel, device):
        return TORCH, f"{fastest.kernel} is faster on this device but absent: {unfit}"
    return fastest.kernel, f"fastest on {device_name(device)}, record {fastest.record}"


def kernel(op: str, device: torch.device | str) -> Callable:
    """The function chosen for `op` on `device`; raises where that cannot run or has
    not passed its parity tests.
    """
    name, reason = choose(op, device)
    match CANDIDATES[op][name]:
        case Plain(function):
            if op in _by_hand and (unfit := why_not(op, name, device)):
                raise EnvironmentUnfit(
                    f"{op}: the kernel {name}, {reason}, cannot run on {device}",
                    value=unfit,
                    allowed=TORCH,
                )
            return function
        case Triton(module):
            if unfit := launch.why_not(device):
                raise EnvironmentUnfit(
                    f"{op}: the kernel {name}, {reason}, cannot run on {device}",
                    value=unfit,
                    allowed=TORCH,
                )
            parity.require(op)
            return getattr(import_module(f"stackproof.kernels.{module}"), op)


def device_name(device: torch.device) -> str:
    """A GPU as torch names it; of a processor the maker and the widest
    instructions that torch uses on it.
    """
    if device.type == "cpu":
        return CPU_NAME
    return (
        torch.cuda.get_device_properties(device).name if torch.cuda.is_available() else device.type
    )


def choices(
    device: torch.device | str, *, compiled: bool = False, dtype: str = "float32"
) -> dict[str, str]:
    """Kernel of every operation of a training step on `device` in `dtype` with the reason,
    JSON-ready, for the record.
    """
    document = {}
    for op in TRAINED:
        name, reason = choose(op, device)
        if compiled and name == TORCH and op in FUSED_BY_COMPILER:
            document |= {op: "torch.compile", f"{op}_reason": "the compiler is given the formula"}
            continue
        if name in (ONEDNN, CHUNKS) and dtype != "float32":
            name, reason = TORCH, f"{name} is for float32, this is {dtype}"
        document |= {op: CANDIDATES[op][name].title, f"{op}_reason": reason}
        if isinstance(CANDIDATES[op][name], Triton):
            document[f"{op}_parity"] = (
                parity.why_not(op) or f"passed on {parity.passed()[op]['passed_on']}"
            )
    if takes_masks(device):
        document["document_attention"] = f"{document['attention']}, boolean mask"
    return document

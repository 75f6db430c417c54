"""The table of operations of a training step, and their kernels. Imports neither torch nor triton.

The choice, the validation of the configuration, the parity list, the comparison and `stack doctor`
read this table. A new kernel needs a row here, a file and tests. The reference of an operation is
the function with its name in `stackproof.contracts.kernel_reference`; `samples.cases` makes the
inputs of its comparison.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackproof.spec.canonical import sha256_json
from stackproof.spec.errors import UsageError

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).parent
AUTO, TORCH, LIBRARY, CHUNKS, ONEDNN, TRITON = (
    "auto",
    "torch",
    "library",
    "chunks",
    "onednn",
    "triton",
)
FLOATS = ("float32", "bfloat16", "float16")


def anywhere(device: "torch.device") -> str:
    return ""


def on_cpu(device: "torch.device") -> str:
    return "" if device.type == "cpu" else f"it is for the CPU, not for {device.type}"


def with_onednn(device: "torch.device") -> str:
    from stackproof.kernels import onednn

    return on_cpu(device) or onednn.WHY_NOT


def with_library(device: "torch.device") -> str:
    from stackproof.kernels import eager

    return eager.why_no_library_linear_cross_entropy()


def with_triton(device: "torch.device") -> str:
    from stackproof.kernels.triton import launch

    return launch.why_not(device)


@dataclass(frozen=True)
class Kernel:
    """One way to compute an operation.

    `module`, below `stackproof.kernels` and imported on first use, defines its function `name`.
    `sources` are the files with its code. `dtypes` are the precisions of a run that it computes; in
    others it calls torch's own. `why_not` returns the reason why it cannot run on a device, empty
    if it can.
    """

    module: str
    name: str
    title: str
    sources: tuple[str, ...]
    why_not: Callable[["torch.device"], str] = anywhere
    dtypes: tuple[str, ...] = FLOATS

    @property
    def is_triton(self) -> bool:
        return self.module.startswith("triton.")

    @property
    def sha256(self) -> str:
        """Hash of the names and texts of its files."""
        return source_hash(self.sources)


def source_hash(names: tuple[str, ...], folder: Path = FOLDER) -> str:
    """sha256 over the names and texts of files of a folder."""
    return sha256_json([(name, (folder / name).read_text("utf-8")) for name in names])


@dataclass(frozen=True)
class Operation:
    """An operation by name. With `fused`, torch.compile receives the formula in place of torch's
    kernel.
    """

    name: str
    kernels: Mapping[str, Kernel]
    fused: bool = False

    def kernel(self, name: str) -> Kernel:
        """The kernel with this name. Raises UsageError with the nearest and the allowed names."""
        if name not in self.kernels:
            raise unknown(f"{self.name} has no kernel {name}", name, self.kernels)
        return self.kernels[name]


def _triton(name: str, *sources: str) -> Kernel:
    files = tuple(f"triton/{s}.py" for s in (*sources, "launch"))
    title = "triton flash attention" if name == "attention" else f"triton {name}"
    return Kernel(f"triton.{sources[0]}", name, title, files, with_triton)


def _written_out(name: str) -> Kernel:
    return Kernel("eager", name, "torch, derivative written out", ("eager.py",))


def _table(*operations: Operation) -> Mapping[str, Operation]:
    # A plain dict: torch.compile rejects a read-only view of one where modules have hooks.
    return {op.name: op for op in operations}


_CHUNKS = ("attention.py", "chunked_attention.py", "custom_op.py")
_HEAD = ("cross_entropy.py", "onednn.py", "custom_op.py")
OPERATIONS = _table(
    Operation(
        "linear",
        {
            TORCH: Kernel("eager", "linear", "torch.nn.functional.linear", ()),
            ONEDNN: Kernel(
                "onednn",
                "linear",
                "oneDNN, small products by torch.nn.functional.linear",
                ("onednn.py", "custom_op.py"),
                with_onednn,
                dtypes=("float32",),
            ),
        },
    ),
    Operation(
        "attention",
        {
            TORCH: Kernel(
                "attention", "attention", "torch.scaled_dot_product_attention", _CHUNKS[:1]
            ),
            CHUNKS: Kernel(
                "attention",
                "in_chunks",
                "torch products of 64 queries at a time, short or few rows by "
                "torch.scaled_dot_product_attention",
                _CHUNKS,
                on_cpu,
                dtypes=("float32",),
            ),
            TRITON: _triton("attention", "flash_attention", "flash_attention_kernels"),
        },
    ),
    Operation(
        "rms_norm",
        {TORCH: _written_out("rms_norm"), TRITON: _triton("rms_norm", "rms_norm")},
        fused=True,
    ),
    Operation(
        "rope",
        {TORCH: _written_out("rope"), TRITON: _triton("rope", "rope")},
        fused=True,
    ),
    Operation(
        "swiglu", {TORCH: _written_out("swiglu"), TRITON: _triton("swiglu", "swiglu")}, fused=True
    ),
    Operation(
        "linear_cross_entropy",
        {
            TORCH: Kernel(
                "cross_entropy",
                "linear_cross_entropy",
                "torch, rows in chunks through one buffer",
                _HEAD[:1],
            ),
            LIBRARY: Kernel(
                "eager",
                "library_linear_cross_entropy",
                "torch.nn.functional.linear_cross_entropy",
                ("eager.py",),
                with_library,
            ),
            ONEDNN: Kernel(
                "cross_entropy",
                "by_onednn",
                "oneDNN, rows in chunks",
                _HEAD,
                with_onednn,
                dtypes=("float32",),
            ),
            TRITON: _triton("linear_cross_entropy", "linear_cross_entropy"),
        },
    ),
)
WORDS = (AUTO, TORCH, TRITON)  # allowed words for `train.kernels` in place of a table


def operation(name: str) -> Operation:
    """The operation with this name. Raises UsageError with the nearest and the allowed names."""
    if name not in OPERATIONS:
        raise unknown(f"{name} is not an operation with kernels", name, OPERATIONS)
    return OPERATIONS[name]


def unknown(what: str, name: str, allowed: Mapping[str, Any] | tuple[str, ...]) -> UsageError:
    """The error for an unknown name, with the nearest names first."""
    near = difflib.get_close_matches(str(name), allowed, cutoff=0.4)
    return UsageError(
        what, value=name, allowed=", ".join([*near, *(a for a in allowed if a not in near)])
    )


def by_operation(setting: str | Mapping[str, str]) -> dict[str, str]:
    """The kernels in `train.kernels` by operation, without operations that it leaves open.

    Raises UsageError for an unknown word, operation or kernel.
    """
    match setting:
        case "auto":
            return {}
        case "torch" | "triton":
            return {op.name: setting for op in OPERATIONS.values() if setting in op.kernels}
        case dict():
            for name, kernel in setting.items():
                chosen_from = operation(name)
                if kernel != AUTO:
                    chosen_from.kernel(kernel)
        case _:
            raise unknown(f"there is no choice of kernels called {setting}", setting, WORDS)
    return {name: kernel for name, kernel in setting.items() if kernel != AUTO}

"""The operations of a training step, each computed by the kernel chosen for its device.
The model calls kernels only through this module.

B batch, T tokens, S keys. Each operation takes the arguments of its reference in
`stackproof.contracts.kernel_reference`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stackproof.contracts.vector_math import select_vector_functions
from stackproof.kernels import choice
from stackproof.kernels.attention import document_mask, window_mask
from stackproof.kernels.choice import Choice
from stackproof.kernels.table import OPERATIONS, TORCH, TRITON, Kernel, operation

__all__ = [*OPERATIONS, "document_mask", "takes_masks", "window_mask"]  # what models call
Replace = Callable[[str, Callable[..., Any]], Callable[..., Any]]

# Whatever computes with the model imports this module first.
select_vector_functions()

# Imported kernel modules; those in Triton are imported when one is chosen.
_modules: dict[str, ModuleType] = {
    kernel.module: import_module(f"{__package__}.{kernel.module}")
    for op in OPERATIONS.values()
    for kernel in op.kernels.values()
    if not kernel.is_triton
}
# by operation, with the type of device that it is for; empty: any
_chosen: dict[str, tuple[Choice, str]] = {}
_NONE: tuple[Choice | None, str] = (None, "")
_replace: Replace | None = None


def _operation(name: str) -> Callable[..., Any]:
    """A function that computes an operation with the kernel chosen for the device of its first
    argument.
    """

    def call(x: Tensor, *rest: Any, **options: Any) -> Any:
        function = kernel(name, x.device, x.dtype)
        return (function if _replace is None else _replace(name, function))(x, *rest, **options)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"Same arguments as `stackproof.contracts.kernel_reference.{name}`."
    return call


linear = _operation("linear")
attention = _operation("attention")
rms_norm = _operation("rms_norm")
rope = _operation("rope")
swiglu = _operation("swiglu")
linear_cross_entropy = _operation("linear_cross_entropy")


def takes_masks(device: torch.device | str) -> bool:
    """Whether the attention of this device takes one mask for all layers in place of ranges of
    visible keys.
    """
    return choose("attention", device).kernel != TRITON


# ---- the choice in force


@contextmanager
def using(**kernels: str) -> Iterator[None]:
    """Choose kernels by hand, `using(attention="triton")`, in the whole
    process until the block ends.

    Raises UsageError for an unknown operation or kernel, EnvironmentUnfit where no device of this
    machine can run it, IntegrityError for a Triton kernel whose source did not pass its parity
    tests.
    """
    devices = (["cuda"] if torch.cuda.is_available() else []) + ["cpu"]
    for op, name in kernels.items():
        fits = [d for d in devices if not operation(op).kernel(name).why_not(torch.device(d))]
        choice.require(
            OPERATIONS[op],
            name,
            torch.device((fits or devices)[0]),
            f'dispatch.using({op}="{TORCH}")',
        )
    with using_choices({op: Choice(name, "chosen by hand", "key") for op, name in kernels.items()}):
        yield


@contextmanager
def using_choices(
    choices: Mapping[str, Choice], device: torch.device | None = None
) -> Iterator[None]:
    """Use these choices in the whole process until the block ends; with a device, only for tensors
    on its type of device.
    """
    global _chosen
    before, where = _chosen, "" if device is None else device.type
    _chosen = before | {op: (chosen, where) for op, chosen in choices.items()}
    try:
        yield
    finally:
        _chosen = before


@contextmanager
def replacing(replace: Replace) -> Iterator[None]:
    """Replace each chosen function by `replace(operation, function)` until the block ends."""
    global _replace
    before, _replace = _replace, replace
    try:
        yield
    finally:
        _replace = before


def choose(op: str, device: torch.device | str) -> Choice:
    """The kernel in use for `op` on `device`: that of the run, one chosen by hand, or the default
    of the device.
    """
    device = torch.device(device) if isinstance(device, str) else device
    chosen, where = _chosen.get(op, _NONE)
    if chosen is not None and where in ("", device.type):
        return chosen
    return choice.by_default(op, device)


def kernel(
    op: str, device: torch.device | str, dtype: torch.dtype | None = None
) -> Callable[..., Any]:
    """The function in use for `op` on `device`.

    Raises EnvironmentUnfit if it cannot run, IntegrityError if its source has not passed its parity
    tests; the choice of a run has checked both already. Triton's kernels have no float64, which
    checks use for comparison: float64 is computed by torch's own.
    """
    chosen, table = choose(op, device), OPERATIONS[op]
    found = table.kernels[chosen.kernel]
    if found.is_triton and dtype is torch.float64:
        return function_of(table.kernels[TORCH])
    if _chosen.get(op, _NONE)[1] == "" and chosen.kernel != TORCH:
        choice.require(
            table, chosen.kernel, torch.device(device), f'train.kernels.{op} = "{TORCH}"'
        )
    return function_of(found)


def function_of(found: Kernel) -> Callable[..., Any]:
    """The function of a kernel, looked up in its module at each call."""
    if found.module not in _modules:
        _modules[found.module] = import_module(f"{__package__}.{found.module}")
    return getattr(_modules[found.module], found.name)


def choices(
    device: torch.device | str, *, compiled: bool = False, dtype: str = "float32"
) -> dict[str, str]:
    """The kernels in use on `device`, JSON-ready, for the environment of a record."""
    device = torch.device(device)
    return choice.document(
        {op: choose(op, device) for op in OPERATIONS}, device, compiled=compiled, dtype=dtype
    )

"""The launch of a Triton kernel, and the checks before it: a device that can run it, and inputs it
was written for.

Importing this file does not import triton. Triton's interpreter runs kernels on the CPU, slowly; it
needs TRITON_INTERPRET=1 in the environment before the first import of triton.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from stackproof.spec.errors import EnvironmentUnfit, UsageError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# a launch option whose default differs between releases of triton
OPTIONS = {"enable_fp_fusion": True}


def interpreted() -> bool:
    """Whether triton was imported in its interpreter's mode."""
    import triton.language as tl

    return "interpreter" in type(tl.sum).__module__


@cache
def installed() -> bool:
    return find_spec("triton") is not None


def why_not(device: torch.device | str) -> str:
    """Why no Triton kernel can run on `device`; empty if one can."""
    kind = torch.device(device).type
    if not installed():
        return "triton is not installed"
    if kind == "cuda":
        return "triton is in its interpreter's mode" if interpreted() else ""
    if kind != "cpu":
        return f"no Triton kernels for {kind}"
    return "" if interpreted() else "on the CPU only Triton's interpreter can run it"


def require(
    kernel: str, inputs: dict[str, Tensor | None], dtypes: Iterable[torch.dtype] = FLOATS
) -> None:
    """Refuse numbers of other dtypes, inputs on several devices, or on a device that runs no Triton
    kernel. Indices are int64.
    """
    tensors = {name: x for name, x in inputs.items() if x is not None}
    devices = {x.device for x in tensors.values()}
    if len(devices) != 1:
        raise UsageError(
            f"{kernel}: inputs lie on several devices",
            value=", ".join(sorted(map(str, devices))),
            allowed="one device",
        )
    device = devices.pop()
    if reason := why_not(device):
        raise EnvironmentUnfit(
            f"the Triton kernel {kernel} cannot run on {device}: {reason}",
            allowed="a CUDA device, or TRITON_INTERPRET=1 set before triton is imported",
            next_step=f'train.kernels.{kernel} = "torch"',
        )
    for name, x in tensors.items():
        if x.dtype not in dtypes and x.dtype != torch.int64:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise UsageError(
                f"{kernel}: {name} has a dtype the kernel was not written for",
                value=x.dtype,
                allowed=allowed,
            )


def strides(x: Tensor | None) -> tuple[int, ...]:
    """Those of an optional matrix; a kernel reads none where it is absent."""
    return (0, 0) if x is None else x.stride()


def run(kernel: Any, grid: tuple[int, ...], x: Tensor, *arguments: Any, **options: Any) -> None:
    """Launch a kernel with these arguments on the device of the first; triton itself takes the
    current device. An empty grid launches nothing.
    """
    if all(grid):
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            kernel[grid](x, *arguments, **options, **OPTIONS)

"""What the tests of all kernels share: cases per device, errors against float64, margins around
memory, broken copies of a kernel.
"""

import importlib.util
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MARGIN = 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Relative error in the 2-norm, and largest error over the largest value. A result of b bits is off
# by half a unit in the last place per rounding: 2^-24, 2^-11, 2^-8 of the value at most. Kernels
# round once at the end and, in attention and cross-entropy, once between two products. Worst cases
# measured over all tests of this folder are in stack/kernels/parity.json. The limits are about
# twice these, and four times for float32, since a GPU's exponential and division are less exact
# than the interpreter's. A scale that is off by one percent is an error of 1e-2 in the 2-norm,
# beyond every first limit.
LIMITS = {torch.float32: (2e-6, 5e-6), torch.float16: (8e-4, 2e-3), torch.bfloat16: (6e-3, 1.5e-2)}
WORST: dict[str, float] = {}
_COPIES = itertools.count()


def cases(interpreted: Iterable[tuple], full: Iterable[tuple]) -> list:
    """Parameters (device, *case): a choice for the interpreter on the CPU,
    the whole grid on a GPU.
    """
    if torch.cuda.is_available():
        return [pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in full]
    absent = [
        pytest.mark.gpu,
        pytest.mark.skip(reason="needs a CUDA device; there the whole grid runs"),
    ]
    return [pytest.param("cpu", *case) for case in interpreted] + [
        pytest.param("cuda", *next(iter(full)), marks=absent)
    ]


def errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Relative error in the 2-norm, and the largest error over the largest value;
    of a zero tensor the error itself.
    """
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    gap = got - want
    norm, top = want.norm(), want.abs().amax() if want.numel() else want.sum()
    return float(gap.norm() / (norm if norm > 0 else 1.0)), float(
        (gap.abs().amax() if gap.numel() else 0.0) / (top if top > 0 else 1.0)
    )


def compare(what: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Fail unless both errors are within the limits of `dtype`; remember the worst."""
    assert got.shape == want.shape, (
        f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    )
    measured, limits = errors(got, want), LIMITS[dtype]
    assert all(m <= limit for m, limit in zip(measured, limits)), (
        f"{what}: errors {measured}, limits {limits} for {dtype}"
    )
    name = str(dtype).removeprefix("torch.")
    WORST[name] = max(WORST.get(name, 0.0), measured[0])


def is_red(what: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    """Whether `compare` fails."""
    worst = dict(WORST)
    try:
        compare(what, got, want, dtype)
    except AssertionError:
        return True
    finally:
        WORST.clear()
        WORST.update(worst)
    return False


def flipped(x: Tensor) -> Tensor:
    """A copy with the sign of the last axis' first channel turned."""
    y = x.detach().clone()
    y[..., 0].neg_()
    return y


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same numbers in float64, as leaves of another graph."""
    return [
        None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors
    ]


# ---- margins


def walled(x: Tensor, poison: float = float("nan")) -> Tensor:
    """The same numbers inside a larger buffer of poison: before and after, and between rows,
    columns and heads, so that nothing is contiguous or aligned. Reading past an edge meets poison.
    """
    buffer = torch.full(
        [n + 2 * MARGIN if i == 0 else n + 3 for i, n in enumerate(x.shape)],
        poison,
        dtype=x.dtype,
        device=x.device,
    )
    inside = buffer[
        tuple(
            slice(MARGIN if i == 0 else 1, (MARGIN if i == 0 else 1) + n)
            for i, n in enumerate(x.shape)
        )
    ]
    inside.copy_(x.detach())
    return inside.requires_grad_(x.requires_grad)


class Margins:
    """Allocations of the kernels' wrappers, each inside a larger buffer: NaN where the result
    belongs, a number around it.
    """

    AROUND = -1234.0

    def __init__(self):
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def install(self, monkeypatch) -> None:
        """Let torch's allocations come from here."""
        new_empty = torch.Tensor.new_empty
        empty = torch.empty

        def like(x, *, dtype=None, memory_format=None, **_):
            return self.flat(x.shape, dtype or x.dtype, x.device, empty)

        def from_tensor(x, *shape, dtype=None, **options):
            shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            if not (dtype or x.dtype).is_floating_point:
                return new_empty(x, *shape, dtype=dtype, **options)
            make = self.spaced if len(shape) == 4 else self.flat
            return make(shape, dtype or x.dtype, x.device, empty)

        def plain(*shape, dtype=None, device="cpu", **_):
            shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            return self.flat(shape, dtype or torch.float32, device, empty)

        monkeypatch.setattr(torch, "empty_like", like)
        monkeypatch.setattr(torch, "empty", plain)
        monkeypatch.setattr(torch.Tensor, "new_empty", from_tensor)

    def flat(self, shape, dtype, device, empty) -> Tensor:
        """Contiguous, with a margin before and after."""
        n = int(np.prod(shape))
        buffer = empty(n + 2 * MARGIN, dtype=dtype, device=device).fill_(self.AROUND)
        return self.keep(buffer, buffer[MARGIN : MARGIN + n].view(*shape))

    def spaced(self, shape, dtype, device, empty) -> Tensor:
        """With gaps along every axis: for outputs whose strides are arguments of the kernel."""
        buffer = empty(*(n + 3 for n in shape), dtype=dtype, device=device).fill_(self.AROUND)
        return self.keep(buffer, buffer[tuple(slice(1, 1 + n) for n in shape)])

    def keep(self, buffer: Tensor, inside: Tensor) -> Tensor:
        inside.fill_(float("nan"))
        self.buffers.append((buffer, inside))
        return inside

    def check(self) -> None:
        """Every margin is as it was. Fails if nothing was allocated: then nothing was checked."""
        assert self.buffers, "no allocation was watched"
        for buffer, inside in self.buffers:
            inside.detach().fill_(self.AROUND)
            assert bool((buffer == torch.tensor(self.AROUND, dtype=buffer.dtype)).all()), (
                f"written outside of {tuple(inside.shape)}"
            )


# ---- broken copies and the interpreter


def broken(module: ModuleType, old: str, new: str, folder) -> ModuleType:
    """A copy of a kernel's module in which `old`, which must occur, is `new`.
    Operations it registers with torch get names of their own.
    """
    text = Path(module.__file__).read_text("utf-8")
    words = (re.escape(w) for w in re.findall(r"\w+|[^\w\s]", old))
    wanted = r"\s*".join(rf",?\s*{w}" if w in (r"\)", r"\]") else w for w in words)
    text, found = re.subn(wanted, lambda match: new, text)  # however it is broken into lines
    assert found, f"{module.__name__} holds no {old!r}"
    text = re.sub(r'(custom_op\(\s*)"stackproof::', rf'\1"copy{next(_COPIES)}::', text)
    path = folder / f"broken_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(text, "utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def mend_interpreter() -> None:
    """Triton's interpreter (seen in 3.9) cuts float32 off to bfloat16 where a GPU rounds to
    nearest, and multiplies the bits of bfloat16 matrices as integers. Products of bfloat16 are
    exact in float32, so widening first is what a tensor core does.

    It also puts its functions in the place of the language's at every call of a function by a
    kernel, though the kernel's launch has done so: a quarter of its time.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    patch = interpreter._patch_lang

    def patch_once(fn):
        used = [v for v in fn.__globals__.values() if v is tl or v is tl.core]
        if any(tl.core.is_builtin(language.load) for language in used):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            numbers = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
            return TensorHandle(
                numbers.view(torch.int16).numpy().view(np.uint16).reshape(src.data.shape),
                tl.bfloat16,
            )
        return cast(self, src, dst_type)

    create_dot.widens_bfloat16 = True
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


def gradients(
    outputs: Tensor | tuple[Tensor, ...], inputs: Iterable[Tensor], weights: Iterable[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of the outputs weighed by `weights`; in float64 if the outputs are."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(
        outputs, tuple(inputs), [w.to(o.dtype) for o, w in zip(outputs, weights)]
    )

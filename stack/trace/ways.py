"""The same weights computed in another way: another precision, plain reference kernels, compiled
blocks; a whole model or one module.
"""

import copy
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.kernels import dispatch, reference
from stackproof.model.build import building
from stackproof.model.transformer import Transformer
from stackproof.spec.errors import UsageError
from stackproof.trace.maps import map_of
from stackproof.trace.points import NameMap, Output

PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SHORT = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
WAYS = (*PRECISIONS, "reference", "compiled")
BETWEEN_BLOCKS = ("embedding", "layers.*.resid_out", "final_norm", "logits")


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a model, its points (None: all), and what must hold while it runs.

    `computes` is the dtype it computes in where that is not its parameters', as under autocast:
    rounding of that size is then granted. `inputs` gives what the forward takes besides the ids,
    anew for each run: documents packed into a row, or a cache that it fills.
    """

    model: nn.Module
    where: NameMap
    title: str = "as it is"
    names: tuple[str, ...] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    inputs: Callable[[], Mapping[str, Any]] = dict
    computes: torch.dtype | None = None


def side(model: nn.Module, way: str | None = None, where: Any = None) -> Side:
    """The model computed in one of WAYS; None as it is. The model itself is not changed.
    Raises UsageError for an unknown way.
    """
    where = map_of(model, where)
    way = SHORT.get(way or "", way)
    match way:
        case None:
            return Side(model, where)
        case "float64" | "float32" | "bfloat16" | "float16":
            made = in_precision(copy.deepcopy(model), PRECISIONS[way])
            if way == "float64" and hasattr(made, "set_experts_implementation"):
                made.set_experts_implementation("eager")  # torch's grouped product has no float64
            return Side(made, where, way)
        case "reference":
            _require_ours(model, "reference")
            return Side(model, where, way, around=reference_kernels)
        case "compiled":
            made = copy.deepcopy(model)
            for path in _blocks(made, where):
                _compile(made.get_submodule(path))
            return Side(made, where, way, names=BETWEEN_BLOCKS)
    raise UsageError(
        f"there is no way {way} to compute a model", allowed=", ".join((*WAYS, *SHORT))
    )


def _require_ours(model: nn.Module, how: str) -> None:
    if not isinstance(model, Transformer):
        raise UsageError(
            f"only our own model has {how} kernels",
            value=type(model).__name__,
            allowed="float64 or another precision",
            next_step="to try a reference of ours, trace the run of ours --against this model",
        )


def in_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast parameters and not buffers: rotary tables stay as they were made, as they do in a model
    that is loaded in half precision.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def _blocks(model: nn.Module, where: NameMap) -> list[str]:
    if not where.blocks:
        raise UsageError(
            "this map does not say which modules are blocks",
            next_step="give a NameMap with blocks='path.of.layers.{}'",
        )
    pattern = where.blocks.replace("{}", "")
    return [
        n
        for n, _ in model.named_modules()
        if n.startswith(pattern) and n.removeprefix(pattern).isdigit()
    ]


def _compile(block: nn.Module) -> None:
    """Compile what a block computes; hooks on the block itself stay outside of the graph."""
    eager = block.forward
    graph = torch.compile(eager)

    def compiled(*args: Any, **kwargs: Any) -> Any:
        with building():
            return graph(*args, **kwargs)

    block.forward, block.eager_forward = compiled, eager


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Our model computes by the slow and plain kernels, in the whole
    process until the block ends.
    """
    with dispatch.replacing(lambda op, function: getattr(reference, op)):
        yield


@contextmanager
def swapped(model: nn.Module, where: NameMap, module: str, how: str) -> Iterator[str]:
    """One module of a model computed otherwise until the block ends: `reference`, a precision, or
    `eager` where it was compiled.

    `module` is a path in the model, or what points say of it (`layers.3.ffn`). Gives the path.
    Raises UsageError if there is none.
    """
    path = module_path(model, where, module)
    part, way = model.get_submodule(path), SHORT.get(how, how)
    own = vars(part).get("forward")
    before, run = part.forward, part
    match way:
        case "reference":
            _require_ours(model, "reference")

            def forward(*args: Any, **kwargs: Any) -> Any:
                with reference_kernels():
                    return before(*args, **kwargs)
        case "eager":
            if not hasattr(run, "eager_forward"):
                raise UsageError(
                    f"{path} is not compiled, so it runs eagerly already",
                    value=f"{module}={how}",
                    next_step="MODEL@compiled",
                )
            forward = run.eager_forward
        case "float64" | "float32" | "bfloat16" | "float16":
            wide, dtype = in_precision(copy.deepcopy(part), PRECISIONS[way]), PRECISIONS[way]

            def forward(*args: Any, **kwargs: Any) -> Any:
                given = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
                args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
                return _cast(wide(*args, **kwargs), given.dtype)
        case _:
            raise UsageError(
                f"there is no way {how} to swap a module to",
                allowed=", ".join(("reference", "eager", *PRECISIONS, *SHORT)),
            )
    part.forward = forward
    try:
        yield path
    finally:
        del part.forward
        if own is not None:
            part.forward = own


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in another dtype, inside tuples and tables too."""
    match value:
        case Tensor():
            return value.to(dtype) if value.is_floating_point() else value
        case tuple() | list():
            return type(value)(_cast(v, dtype) for v in value)
        case dict():
            return {k: _cast(v, dtype) for k, v in value.items()}
    return value


def module_path(model: nn.Module, where: NameMap, name: str) -> str:
    """The path of the module that a name means: a path itself,
    or `layers.3.ffn` by what makes `layers.3.ffn.out`.
    """
    paths = [n for n, _ in model.named_modules()]
    if name in paths and name:
        return name
    pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", name)
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    for candidate in (pattern, f"{pattern}.out", f"{pattern}_out"):
        match where.places.get(candidate):
            case Output(path) if path.format(*numbers) in paths:
                return path.format(*numbers)
    raise UsageError(
        f"the model has no module {name}",
        allowed=f"nearest: {', '.join(difflib.get_close_matches(name, paths, n=3, cutoff=0))}",
    )

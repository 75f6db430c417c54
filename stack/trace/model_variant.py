"""A model as it runs in a comparison: as it is, in another precision, with reference kernels,
or compiled.

Also swaps how a single module computes.
"""

import copy
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stackproof.contracts import kernel_reference as reference
from stackproof.kernels import dispatch
from stackproof.model.build import building
from stackproof.model.transformer import Transformer
from stackproof.spec.errors import UsageError
from stackproof.trace.hooks import Handler, hook_points, replaced
from stackproof.trace.maps import map_of
from stackproof.trace.points import NameMap, Output
from stackproof.trace.trace import run

PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SHORT = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MODES = (*PRECISIONS, "reference", "compiled")
BETWEEN_BLOCKS = ("embedding", "layers.*.resid_out", "final_norm", "logits")


@dataclass(frozen=True)
class ModelVariant:
    """A model, its name map, the points to compare (None: all), and the context that it runs in.

    `inputs` creates the arguments of the forward other than the ids, for each run: document ids or
    a cache. `computes` is the dtype of the arithmetic if it is not that of the parameters, as under
    autocast; it sets the bound for rounding.
    """

    model: nn.Module
    where: NameMap
    names: tuple[str, ...] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    inputs: Callable[[], Mapping[str, Any]] = dict
    computes: torch.dtype | None = None

    @contextmanager
    def running(
        self,
        input_ids: Tensor,
        names: Iterable[str] = (),
        handler: Handler = lambda point, x: None,
        *,
        on_grad: Handler | None = None,
        inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Iterator[Tensor]:
        """Logits of one forward with hooks at `names`; hooks and context
        last until the block ends.
        """
        with self.around():
            inputs = self.inputs()
            with (
                inside(),
                hook_points(self.model, names, handler, where=self.where, on_grad=on_grad),
            ):
                yield run(self.model, input_ids, inputs)


def variant(model: nn.Module, mode: str | None = None, where: Any = None) -> ModelVariant:
    """The model computed in one of MODES; None as it is. `model` is not changed.
    Raises UsageError for an unknown mode.
    """
    where = map_of(model, where)
    mode = SHORT.get(mode or "", mode)
    match mode:
        case None:
            return ModelVariant(model, where)
        case "float64" | "float32" | "bfloat16" | "float16":
            made = in_precision(copy.deepcopy(model), PRECISIONS[mode])
            if mode == "float64" and hasattr(made, "set_experts_implementation"):
                made.set_experts_implementation("eager")  # torch's grouped product has no float64
            return ModelVariant(made, where)
        case "reference":
            _require_ours(model)
            return ModelVariant(model, where, around=reference_kernels)
        case "compiled":
            made = copy.deepcopy(model)
            for path in _blocks(made, where):
                _compile(made.get_submodule(path))
            return ModelVariant(made, where, names=BETWEEN_BLOCKS)
    raise UsageError(
        f"unknown compute mode {mode}",
        allowed=", ".join((*MODES, *SHORT)),
        next_step="MODEL@bfloat16",
    )


def _require_ours(model: nn.Module) -> None:
    if not isinstance(model, Transformer):
        raise UsageError(
            "only models of this stack have reference kernels",
            value=type(model).__name__,
            allowed="float64 or another precision",
            next_step="to test one of our reference kernels, trace our run --against this model",
        )


def in_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast parameters, not buffers: a model loaded in half precision keeps
    its rotary tables as well.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def _blocks(model: nn.Module, where: NameMap) -> list[str]:
    if not where.blocks:
        raise UsageError(
            "the name map does not name the blocks",
            next_step="give a NameMap with blocks='path.of.layers.{}'",
        )
    pattern = where.blocks.replace("{}", "")
    return [
        n
        for n, _ in model.named_modules()
        if n.startswith(pattern) and n.removeprefix(pattern).isdigit()
    ]


def _compile(block: nn.Module) -> None:
    """Compile the forward of a block; hooks on the block itself stay outside of the graph."""
    eager = block.forward
    graph = torch.compile(eager)

    def compiled(*args: Any, **kwargs: Any) -> Any:
        with building():
            return graph(*args, **kwargs)

    block.forward, block.eager_forward = compiled, eager


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Our models use the reference kernels, in the whole process until the block ends."""
    with dispatch.replacing(lambda op, function: getattr(reference, op)):
        yield


@contextmanager
def swapped(model: nn.Module, where: NameMap, module: str, how: str) -> Iterator[str]:
    """Compute one module otherwise until the block ends: `reference`, a precision,
    or `eager` if it was compiled.

    `module` is a path in the model, or the prefix of its points (`layers.3.ffn`). Yields the path.
    Raises UsageError for an unknown module or mode.
    """
    path = module_path(model, where, module)
    part, mode = model.get_submodule(path), SHORT.get(how, how)
    before = part.forward
    match mode:
        case "reference":
            _require_ours(model)

            def forward(*args: Any, **kwargs: Any) -> Any:
                with reference_kernels():
                    return before(*args, **kwargs)
        case "eager":
            if not hasattr(part, "eager_forward"):
                raise UsageError(
                    f"{path} is not compiled, so it already runs eagerly",
                    value=f"{module}={how}",
                    next_step="MODEL@compiled",
                )
            forward = part.eager_forward
        case "float64" | "float32" | "bfloat16" | "float16":
            cast, dtype = in_precision(copy.deepcopy(part), PRECISIONS[mode]), PRECISIONS[mode]

            def forward(*args: Any, **kwargs: Any) -> Any:
                given = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
                args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
                return _cast(cast(*args, **kwargs), given.dtype)
        case _:
            raise UsageError(
                f"unknown mode {how} to swap a module to",
                allowed=", ".join(("reference", "eager", *PRECISIONS, *SHORT)),
            )
    with replaced(part, "forward", forward):
        yield path


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point tensors, also inside tuples, lists and dicts."""
    match value:
        case Tensor():
            return value.to(dtype) if value.is_floating_point() else value
        case tuple() | list():
            return type(value)(_cast(v, dtype) for v in value)
        case dict():
            return {k: _cast(v, dtype) for k, v in value.items()}
    return value


def module_path(model: nn.Module, where: NameMap, name: str) -> str:
    """Path of the module with this name: a path itself, or `layers.3.ffn` for the module that
    computes `layers.3.ffn.out`.
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

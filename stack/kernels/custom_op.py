"""A function of tensors as an operation of torch's registry: one piece to autograd,
to a compiler and to a profile.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


class CustomOp:
    """`name` is "namespace::name". `function` runs on a CPU, changes no input and returns none, nor
    a view; its annotations are its schema.

    `torch.library.custom_op` does the same, but imports torch's compiler at the first call, a
    second and 120 MB. Unless it is `derived`, followed by `derive`, autograd is refused a way
    through it.
    """

    def __init__(self, name: str, function: Function, fake: Function, derived: bool):
        namespace, _, own = name.partition("::")
        self.name, self.library = name, torch.library.Library(namespace, "FRAGMENT")
        self.library.define(own + torch.library.infer_schema(function, mutates_args=()))
        self.library.impl(own, function, "CPU")
        torch.library.register_fake(name, fake, lib=self.library)
        self.call = getattr(getattr(torch.ops, namespace), own).default
        if not derived:
            self.derive(self._refused, lambda ctx, inputs, output: None)

    def __call__(self, *given: Any) -> Any:
        return self.call(*given)

    def derive(self, backward: Function, save: Function) -> None:
        """`save(ctx, inputs, output)` keeps what `backward(ctx, *gradients)` needs."""
        torch.library.register_autograd(self.name, backward, setup_context=save, lib=self.library)

    def _refused(self, ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{self.name} has no derivative: autograd goes through the operation it belongs to "
            "only once"
        )


def custom_op(
    name: str, fake: Function, *, derived: bool = False
) -> Callable[[Function], CustomOp]:
    """Decorates the function of a `CustomOp`; `fake` gives results of the right shapes
    and strides without values.
    """
    return lambda function: CustomOp(name, function, fake, derived)

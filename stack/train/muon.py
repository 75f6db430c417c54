"""Muon: momentum whose singular values are brought near one.
N matrices of one shape, A rows, B columns.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stackproof.contracts.conditions import ensure, require

# a + b·s² + c·s⁴ times s, applied to each singular value: steep at zero,
# and within 0.3 of one after five times.
QUINTIC = (3.4445, -4.7750, 2.0315)
NORM_MIN = 1e-7


@require(lambda x_NAB: x_NAB.ndim == 3, "a stack of matrices")
@ensure(lambda result, x_NAB: result.shape == x_NAB.shape, "orthogonalising keeps the shape")
def orthogonalise(x_NAB: Tensor, *, steps: int, dtype: torch.dtype) -> Tensor:
    """Each matrix with its singular vectors kept and its singular values pushed into about 0.7 …
    1.2, (N, A, B) of `dtype`.

    Newton-Schulz: only products, which a GPU does in bfloat16. In float32 it agrees with float64 to
    five digits; in bfloat16 to two. Source: Keller Jordan, Muon: an optimizer for hidden layers in
    neural networks, 2024.
    """
    a, b, c = QUINTIC
    tall = x_NAB.shape[1] > x_NAB.shape[2]
    x = x_NAB.mT if tall else x_NAB
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=NORM_MIN)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def shape_factor(rows: int, columns: int, lr_scale: str) -> float:
    """Factor on the learning rate of a matrix: `match-rms-adamw` (arXiv:2502.16982, sec.
    2.2) or `original`.
    """
    match lr_scale:
        case "match-rms-adamw":
            return 0.2 * max(rows, columns) ** 0.5
        case "original":
            return max(1.0, rows / columns) ** 0.5
    raise AssertionError(f"lr_scale is {lr_scale}")


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalisation, decoupled decay.
    Matrices of one shape are orthogonalised together.

    torch.optim.Muon is the same rule in bfloat16 only, one matrix at a time; a CPU without bfloat16
    units needs twenty times longer for it.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        lr_scale: str,
        dtype: str,
    ):
        settings = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "lr_scale": lr_scale,
            "dtype": dtype,
        }
        super().__init__(groups, settings)

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _mean(self, parameter: Tensor) -> Tensor:
        if "momentum_buffer" not in self.state[parameter]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return self.state[parameter]["momentum_buffer"]

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters]
        means = [self._mean(p) for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        ahead = (
            torch._foreach_lerp(gradients, means, group["momentum"]) if group["nesterov"] else means
        )
        turned_NAB = orthogonalise(
            torch.stack(tuple(ahead)), steps=group["ns_steps"], dtype=getattr(torch, group["dtype"])
        )
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        lr = group["lr"] * shape_factor(*parameters[0].shape, group["lr_scale"])
        torch._foreach_add_(
            parameters, list(turned_NAB.to(parameters[0].dtype).unbind()), alpha=-lr
        )

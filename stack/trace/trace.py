"""One forward of one model with statistics of every point. B batch, T tokens, V vocab"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackproof.spec.errors import UsageError
from stackproof.trace.hooks import hook_points
from stackproof.trace.points import NameMap, Place, Point
from stackproof.trace.stats import Gatherer, Stat

Names = NameMap | Mapping[str, str | Place] | None


@dataclass(frozen=True)
class Traced:
    """One point with the statistics of its value and, if traced, of its gradient."""

    point: Point
    stat: Stat
    grad: Stat | None = None


@dataclass(frozen=True)
class Trace:
    """The points of one forward in execution order.
    `unseen` are points that did not run or hold other tokens.
    """

    points: tuple[Traced, ...]
    logits: Tensor
    unseen: tuple[str, ...]
    loss_nats: float | None = None

    def __getitem__(self, name: str) -> Traced:
        """The point of this name. Raises UsageError if it was not traced."""
        for traced in self.points:
            if traced.point.name == name:
                return traced
        raise UsageError(
            f"{name} was not traced", allowed=", ".join(t.point.name for t in self.points)[:400]
        )


def logits_of(output: Any) -> Tensor:
    """The logits in the output of a model: a tensor, the first of a tuple,
    or the field `logits`.
    """
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def run(model: nn.Module, input_ids_BT: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
    """Logits of a forward in the current mode; `inputs` are further arguments."""
    return logits_of(model(input_ids_BT, **(inputs or {})))


def untraced(model: nn.Module, input_ids_BT: Tensor, with_gradients: bool) -> Tensor:
    """Logits of a forward without hooks of tracing, by the kernels of a traced one."""
    with torch.set_grad_enabled(with_gradients):
        return run(model, input_ids_BT).detach()


def values_at(
    model: nn.Module, input_ids_BT: Tensor, names: Iterable[str] | None, where: Names = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Copies of the values at these points during one forward, by name in order, and the logits."""
    held: dict[str, Tensor] = {}
    with (
        torch.no_grad(),
        hook_points(model, names, lambda p, x: held.update({p.name: x.clone()}), where=where),
    ):
        return held, run(model, input_ids_BT)


def trace(
    model: nn.Module,
    input_ids: Tensor,
    names: Iterable[str] | None = None,
    *,
    backward: bool = False,
    tokens: Literal["all", "last"] = "all",
    where: Names = None,
) -> Trace:
    """Statistics of the points that `names` select (None: all) while `model(input_ids)` runs once;
    input_ids (B, T) int64.

    Logits are bit-equal to those without tracing. `backward` adds gradients of the mean next-token
    loss; `.grad` of the parameters stays unchanged. The model runs in its current mode. Raises
    UsageError for unknown points, for ids that are not (B, T), and for gradients of fewer than two
    tokens.
    """
    if not isinstance(input_ids, Tensor):
        raise UsageError(
            "input_ids is not a tensor",
            value=type(input_ids).__name__,
            allowed="(B, T) int64",
            next_step="torch.tensor([[1, 2, 3]])",
        )
    if input_ids.ndim != 2 or input_ids.shape[1] < 1 + backward:
        allowed = "(B, T) with at least 2 tokens" if backward else "(B, T)"
        raise UsageError(
            "these ids cannot be traced", value=tuple(input_ids.shape), allowed=allowed
        )
    values, gradients = Gatherer(tokens), Gatherer(tokens)
    rows: set[str] = set()

    def note(gatherer: Gatherer, point: Point, x: Tensor) -> None:
        if tokens == "all" or tuple(x.shape[:2]) == tuple(input_ids.shape):
            gatherer.see(point, x)
        else:
            rows.add(point.name)

    on_grad = (lambda p, g: note(gradients, p, g)) if backward else None
    with (
        torch.set_grad_enabled(backward),
        hook_points(
            model,
            names,
            lambda p, x: note(values, p, x),
            where=where,
            on_grad=on_grad,
            scratch=True,
        ) as points,
    ):
        logits = run(model, input_ids)
        loss = backward_of(model, logits, input_ids)[0] if backward else None
    stats, grads = values.finish(), gradients.finish()
    traced = tuple(Traced(p, stats[p.name], grads.get(p.name)) for p in points if p.name in stats)
    return Trace(
        traced, logits.detach(), tuple(p.name for p in points if p.name not in stats), loss
    )


def backward_of(
    model: nn.Module, logits_BTV: Tensor, input_ids_BT: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """The mean next-token loss in nats and its gradient at each parameter;
    `.grad` stays unchanged.
    """
    loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), input_ids_BT[:, 1:].flatten())
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not wanted:
        raise UsageError(
            "no parameter of this model requires a gradient",
            next_step="model.requires_grad_(True), or trace without backward",
        )
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return float(loss.detach()), {n: g for n, g in zip(wanted, found) if g is not None}

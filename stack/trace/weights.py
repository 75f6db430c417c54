"""Statistics of parameters, and of their change since an earlier checkpoint."""

import re
from dataclasses import dataclass

from torch import Tensor, nn

from stackproof.spec.errors import UsageError
from stackproof.trace.points import Point
from stackproof.trace.stats import Gatherer, Stat


@dataclass(frozen=True)
class Weight:
    """One parameter. Rows of a matrix count as tokens, columns as channels; a vector is one column.

    `update` are statistics of the change, `update_ratio` is its rms over that
    of the earlier parameter.
    """

    point: Point
    stat: Stat
    update: Stat | None = None
    update_ratio: float | None = None


def weights(model: nn.Module, before: nn.Module | None = None) -> tuple[Weight, ...]:
    """Statistics of every parameter in the order of the model, and of its change since `before`;
    no forward runs.

    Raises UsageError if `before` has other parameters.
    """
    now = dict(model.named_parameters())
    points = [point_of(name, order) for order, name in enumerate(now)]
    values, changes, earlier = Gatherer(), Gatherer(), Gatherer()
    for point in points:
        values.see(point, _as_rows(now[point.name]))
    if before is not None:
        then = dict(before.named_parameters())
        _refuse_others(now, then)
        for point in points:
            earlier.see(point, _as_rows(then[point.name]))
            changes.see(
                point,
                _as_rows(now[point.name].detach().double() - then[point.name].detach().double()),
            )
    stats, moved, old = values.finish(), changes.finish(), earlier.finish()
    return tuple(
        Weight(
            p,
            stats[p.name],
            moved.get(p.name),
            moved[p.name].rms / old[p.name].rms if p.name in old and old[p.name].rms > 0 else None,
        )
        for p in points
    )


def point_of(name: str, order: int) -> Point:
    """`layers.3.ffn.up.weight` has layer 3 and slot `ffn.up.weight`:
    the first number is the layer.
    """
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return Point(
        name,
        None if found is None else int(found[1]),
        name if found is None else name[found.end() :],
        order,
    )


def _as_rows(parameter: Tensor) -> Tensor:
    """(1, rows, columns) of any tensor."""
    return parameter.detach().reshape(1, parameter.shape[0] if parameter.ndim else 1, -1)


def _refuse_others(now: dict[str, Tensor], then: dict[str, Tensor]) -> None:
    odd = [
        n for n in {**now, **then} if n not in now or n not in then or now[n].shape != then[n].shape
    ]
    if odd:
        raise UsageError(
            "the two models have other parameters, so there is no change to compute",
            value=", ".join(odd[:4]),
            allowed="two checkpoints of one run",
        )

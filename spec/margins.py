"""Margins of a gate's limits, computed from kills: to the clean stack on one side, to the weakest
plant on the other.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from stackproof.spec.gates import Gate, Limit, Spec
from stackproof.spec.records import Kill, Scalar


class Margin(NamedTuple):
    """The margins of one limit. A ratio above 1 is on the right side of the limit; it is infinite
    for a limit or a value of 0.

    `clean` is the worst value on the clean stack, `room` the ratio of the limit to it. `plants` are
    the plants that this limit alone catches, `value` is the measurement of the weakest of them,
    `reach` its ratio to the limit.
    """

    gate: str
    limit: str
    bound: float
    unit: str
    direction: str
    clean: float
    room: float
    plants: int
    weakest: str
    value: float
    reach: float


def measured_for(name: str, limit: Limit, measured: Mapping[str, Scalar]) -> float | None:
    """The worst measurement of a check for a limit; None without a measurement. NaN counts as
    infinite.
    """
    names = limit.measured or (name.removesuffix("_max").removesuffix("_min"),)
    values = [_number(measured[n]) for n in names if n in measured]
    if not values or None in values:
        return None
    if any(math.isnan(v) for v in values):
        return -math.inf if limit.direction == "at-least" else math.inf
    return min(values) if limit.direction == "at-least" else max(values)


def _number(value: Scalar) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def _times(large: float, small: float) -> float:
    """`large` over `small`, both at least 0; infinite if `small` is 0."""
    return math.inf if small == 0 else large / small


def _ahead(better: float, worse: float, limit: float) -> float:
    """Ratio of a number to another. For shares with a lower limit, the ratio of their distances to
    1.
    """
    share = 0.5 <= limit < 1 and 0 <= worse <= better <= 1
    return _times(1 - worse, 1 - better) if share else _times(better, worse)


def margins(spec: Spec, kills: Iterable[Kill]) -> list[Margin]:
    """The margins of every limit with a measurement both on the clean stack and on a plant that the
    check caught.
    """
    killed = [
        k for k in kills if k.outcome == "killed" and k.control == "pass" and k.gate in spec.gates
    ]
    found = []
    for gate in spec.gates.values():
        of_gate = [k for k in killed if k.gate == gate.id]
        found += [
            m
            for name, limit in gate.limits.items()
            if (m := _margin(gate, name, limit, of_gate)) is not None
        ]
    return found


def _margin(gate: Gate, name: str, limit: Limit, kills: list[Kill]) -> Margin | None:
    clean = [v for k in kills if (v := measured_for(name, limit, k.control_measured)) is not None]
    caught = {
        k.plant: v
        for k in kills
        if (v := measured_for(name, limit, k.measured)) is not None and not limit.allows(v)
    }
    if not clean or not caught or limit.direction == "exactly":
        return None
    low = limit.direction == "at-least"
    worst = min(clean) if low else max(clean)
    if not limit.allows(worst):  # it fails only together with another limit
        return None
    weakest = (max if low else min)(caught, key=caught.__getitem__)
    room = _ahead(worst, limit.value, limit.value) if low else _times(limit.value, worst)
    reach = (
        _ahead(limit.value, caught[weakest], limit.value)
        if low
        else _times(caught[weakest], limit.value)
    )
    return Margin(
        gate.id,
        name,
        limit.value,
        limit.unit,
        limit.direction,
        worst,
        room,
        len(caught),
        weakest,
        caught[weakest],
        reach,
    )

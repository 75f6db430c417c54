"""One model by itself: each point against its layer before and against all layers, the first
anomaly, and what follows from it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from stackproof.trace.stats import Stat
from stackproof.trace.trace import Trace

# Replayed on the founding run (28 layers, 6 slots): the largest ratio to the layer before outside
# the anomaly and what follows from it is 4.8 (ffn_norm of layer 1), the anomaly's 17.2; its robust
# z is 2.85. Alone, neither figure names it: the last layer has 3.87 there.
RATIO = 8.0  # times the layer before, or one over it
ROBUST_Z = 2.5
FEWEST = 5  # layers without which a spread over layers says nothing
# A massive activation is one token and one channel (arXiv:2402.17762): these shares of all energy,
# among at least so many tokens.
TOKEN_SHARE, VALUE_SHARE, TOKENS = 0.5, 0.25, 8
GAIN_RISE = 2.0  # times the layer before


@dataclass(frozen=True)
class Row:
    """One slot in one layer. `ratio_to_previous` is std over that of the layer before, `robust_z`
    of log std over the layers of the slot.

    `baseline` says what both were compared with; both are None where there is nothing to compare
    with. `massive` says that one token and one channel hold the energy, or that this token still
    does further on. `cascade` marks what comes after the first anomaly and is out of line as well.
    """

    point: str
    layer: int
    slot: str
    std: float
    ratio_to_previous: float | None
    robust_z: float | None
    baseline: str
    anomalous: bool
    massive: bool | None
    cascade: bool = False


@dataclass(frozen=True)
class Gain:
    """std(swiglu) / (std(silu)·std(up)) of one layer, over that of the layer before."""

    layer: int
    gain: float
    ratio_to_previous: float | None


@dataclass(frozen=True)
class Profile:
    """All rows in execution order, the first anomaly, the gains of gated products,
    and what they say in words.
    """

    rows: tuple[Row, ...]
    first_anomaly: Row | None
    gains: tuple[Gain, ...]
    verdict: str


def profile(trace: Trace) -> Profile:
    """Judge the layers of a trace against each other."""
    judged = (
        t
        for t in trace.points
        if t.point.layer is not None and not _of_one_expert(t.point.slot) and not _settled(t.stat)
    )
    stats = {(t.point.layer, t.point.slot): t.stat for t in judged}
    return of_spreads({key: s.std for key, s in stats.items()}, stats)


def _of_one_expert(slot: str) -> bool:
    """Experts see other tokens in each layer, so their layers are no baseline of each other."""
    return slot.startswith("experts.")


def _settled(stat: Stat) -> bool:
    """One token has one key to look at: its entropy is 0 in every model."""
    return stat.support.slot == "entropy" and stat.support.shape[1] == 1


def of_spreads(
    std: Mapping[tuple[int, str], float], stats: Mapping[tuple[int, str], Stat] | None = None
) -> Profile:
    """The same from the standard deviations by layer and slot, in execution order; `stats` tell
    massive activations from bugs.
    """
    rows = _marked(
        [_row(layer, slot, std, (stats or {}).get((layer, slot)), stats) for layer, slot in std],
        stats or {},
    )
    found = next((r for r in rows if r.anomalous and not r.massive), None) or next(
        (r for r in rows if r.anomalous), None
    )
    if found is not None:
        at = rows.index(found)
        rows = [
            replace(r, cascade=i > at and (r.anomalous or _high(r, found)))
            for i, r in enumerate(rows)
        ]
        found = rows[at]
    gains = _gains(std)
    verdict = _verdict(found, gains, stats is not None)
    if found is None and all(r.baseline == "none" for r in rows):
        verdict = (
            "nothing to hold these points against: a layer is judged by the one before it and by "
            "the median of all"
        )
    return Profile(tuple(rows), found, gains, verdict)


def _marked(rows: Sequence[Row], stats: Mapping[tuple[int, str], Stat]) -> list[Row]:
    """Massive is as well what a massive activation makes of its token further on,
    spread over all channels by a matrix.
    """
    tokens: set[int] = set()
    marked = []
    for row in rows:
        stat = stats.get((row.layer, row.slot))
        if row.massive:
            tokens.add(stat.top_token)
        elif (
            stat is not None
            and stat.top_token in tokens
            and stat.top_token_energy_frac >= TOKEN_SHARE
        ):
            row = replace(row, massive=True)
        marked.append(row)
    return marked


def _row(
    layer: int,
    slot: str,
    std: Mapping[tuple[int, str], float],
    stat: Stat | None,
    stats: Mapping | None,
) -> Row:
    value, previous = std[layer, slot], std.get((layer - 1, slot))
    over_layers = [s for (_, other), s in std.items() if other == slot]
    comparable = (
        stats is None
        or (layer - 1, slot) not in stats
        or stat.support.differs(stats[layer - 1, slot].support) is None
    )
    ratio = value / previous if previous and comparable else None
    z = robust_z(value, over_layers)
    # of the first layer only a large value is odd: the stream grows with depth
    if ratio is None and previous is None and z is not None:
        out = value / median(over_layers) >= RATIO and z >= ROBUST_Z
    else:
        out = (
            ratio is not None
            and not 1 / RATIO < ratio < RATIO
            and (z is None or abs(z) >= ROBUST_Z)
        )
    dead = value == 0 or not math.isfinite(value)
    named = [f"layer {layer - 1}"] if ratio is not None else []
    named += [f"median of {len(over_layers)} layers"] if z is not None else []
    baseline = " and ".join(named) or "none"
    return Row(
        f"layers.{layer}.{slot}",
        layer,
        slot,
        value,
        ratio,
        z,
        baseline,
        out or dead,
        None if stat is None else massive(stat),
    )


def robust_z(value: float, over: Sequence[float]) -> float | None:
    """Deviations of log `value` from the median of the logarithms, in units of 1.4826·MAD; None of
    fewer than FEWEST or of a zero.
    """
    if len(over) < FEWEST or any(not math.isfinite(v) or v <= 0 for v in (value, *over)):
        return None
    logs = [math.log(v) for v in over]
    middle = median(logs)
    spread = 1.4826 * median(abs(v - middle) for v in logs)
    return (
        (math.log(value) - middle) / spread
        if spread > 0
        else (0.0 if math.log(value) == middle else math.inf)
    )


def massive(stat: Stat) -> bool:
    """Whether one value holds the energy: one token with half of it and one channel with a quarter,
    among TOKENS tokens or more.
    """
    tokens = math.prod(stat.support.shape[:2])
    return (
        tokens >= TOKENS
        and stat.top_token_energy_frac >= TOKEN_SHARE
        and stat.peak_energy_frac >= VALUE_SHARE
    )


def _high(row: Row, first: Row) -> bool:
    """Above all but a few layers in the layer of the first anomaly or the next: what a large value
    there makes of those after it.
    """
    return (
        row.layer - first.layer <= 1 and row.robust_z is not None and abs(row.robust_z) >= ROBUST_Z
    )


def _gains(std: Mapping[tuple[int, str], float]) -> tuple[Gain, ...]:
    made: dict[int, float] = {}
    for layer in sorted({layer for layer, slot in std if slot == "ffn.swiglu"}):
        below = std.get((layer, "ffn.silu"), 0.0) * std.get((layer, "ffn.up"), 0.0)
        if below > 0:
            made[layer] = std[layer, "ffn.swiglu"] / below
    return tuple(Gain(i, g, g / made[i - 1] if made.get(i - 1) else None) for i, g in made.items())


def _verdict(found: Row | None, gains: Sequence[Gain], has_stats: bool) -> str:
    """What the figures say in words, and no more."""
    if found is None:
        return "no layer is out of line with the layer before it and with all layers"
    said = f"{found.point} is the first anomaly: std {found.std:.4g}"
    said += (
        f", {found.ratio_to_previous:.3g} times the layer before"
        if found.ratio_to_previous is not None
        else ""
    )
    said += f", robust z {found.robust_z:.2f}" if found.robust_z is not None else ""
    if found.massive:
        return (
            f"{said}; one token and one channel hold the energy: a massive activation, as trained "
            "models have them, and no sign of a bug"
        )
    gain = next((g for g in gains if g.layer == found.layer), None)
    if (
        found.slot == "ffn.swiglu"
        and gain is not None
        and gain.ratio_to_previous is not None
        and gain.ratio_to_previous >= GAIN_RISE
    ):
        said += (
            f"; gate and up are in line, their product is not: gain {gain.gain:.3g}, "
            f"{gain.ratio_to_previous:.3g} times the layer before"
        )
        said += (
            ". Factors that are large in the same token and channel do that; a misaligned "
            "product, which pairs values that do not"
        )
        said += " belong together, does not raise the gain"
        said += (
            ""
            if has_stats
            else (
                ". Whether one token holds the energy was not recorded: a massive activation is "
                "likely, and not shown"
            )
        )
    return said

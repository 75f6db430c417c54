"""Anomalies of one model: each point compared with the layer before and with all layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from stackproof.trace.stats import Stat
from stackproof.trace.trace import Trace

# On the founding run (28 layers, 6 slots) the anomaly has a ratio of 17.2 to the layer before and a
# robust z of 2.85. Outside of it and its consequences the largest ratio is 4.8 (ffn_norm of layer
# 1); the last layer has a z of 3.87. Neither value alone identifies the anomaly.
RATIO = 8.0  # times the layer before, or one over it
ROBUST_Z = 2.5
FEWEST = 5  # layers needed for a robust z
# A massive activation is one token and one channel (arXiv:2402.17762) with these shares of the
# energy of at least TOKENS tokens.
TOKEN_SHARE, VALUE_SHARE, TOKENS = 0.5, 0.25, 8
GAIN_RISE = 2.0  # times the layer before


@dataclass(frozen=True)
class Row:
    """One slot in one layer. `ratio_to_previous` is std over that of the layer before, `robust_z`
    of log std over the layers of the slot.

    `baseline` names what both are compared with; without a baseline both are None. `massive`: one
    token and one channel hold the energy, or the same token does so after one. `cascade`: anomalous
    after the first anomaly.
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
    and a verdict in words.
    """

    rows: tuple[Row, ...]
    first_anomaly: Row | None
    gains: tuple[Gain, ...]
    verdict: str


def profile(trace: Trace) -> Profile:
    """Compare the layers of a trace with each other."""
    judged = (
        t
        for t in trace.points
        if t.point.layer is not None and not _of_one_expert(t.point.slot) and not _settled(t.stat)
    )
    stats = {(t.point.layer, t.point.slot): t.stat for t in judged}
    return of_spreads({key: s.std for key, s in stats.items()}, stats)


def _of_one_expert(slot: str) -> bool:
    """Experts process other tokens in each layer, so layers are not a baseline for each other."""
    return slot.startswith("experts.")


def _settled(stat: Stat) -> bool:
    """The attention entropy of a single token is 0 in every model."""
    return stat.support.slot == "entropy" and stat.support.shape[1] == 1


def of_spreads(
    std: Mapping[tuple[int, str], float], stats: Mapping[tuple[int, str], Stat] | None = None
) -> Profile:
    """Profile from standard deviations by (layer, slot) in execution order;
    `stats` identify massive activations.
    """
    known = stats or {}
    rows = _marked([_row(layer, slot, std, known) for layer, slot in std], known)
    anomalous = [r for r in rows if r.anomalous]
    found = next((r for r in anomalous if not r.massive), anomalous[0] if anomalous else None)
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
            "these points have no baseline: a layer is compared with the one before it and with "
            "the median of all"
        )
    return Profile(tuple(rows), found, gains, verdict)


def _marked(rows: Sequence[Row], stats: Mapping[tuple[int, str], Stat]) -> list[Row]:
    """Also mark later rows in which the token of a massive activation still holds the energy."""
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
    stats: Mapping[tuple[int, str], Stat],
) -> Row:
    value, previous = std[layer, slot], std.get((layer - 1, slot))
    stat, before = stats.get((layer, slot)), stats.get((layer - 1, slot))
    over_layers = [s for (_, other), s in std.items() if other == slot]
    comparable = before is None or stat.support.differs(before.support) is None
    ratio = value / previous if previous and comparable else None
    z = robust_z(value, over_layers)
    # in the first layer only a large value is anomalous: the stream grows with depth
    if previous is None and z is not None:
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
    """Deviation of log `value` from the median of the logarithms in units of 1.4826·MAD; None for
    fewer than FEWEST or a zero.
    """
    if len(over) < FEWEST or any(not math.isfinite(v) or v <= 0 for v in (value, *over)):
        return None
    logs = [math.log(v) for v in over]
    middle = median(logs)
    spread = 1.4826 * median(abs(v - middle) for v in logs)
    if spread > 0:
        return (math.log(value) - middle) / spread
    return 0.0 if math.log(value) == middle else math.inf


def massive(stat: Stat) -> bool:
    """Whether one token holds half of the energy and one value a quarter,
    among TOKENS tokens or more.
    """
    tokens = math.prod(stat.support.shape[:2])
    return (
        tokens >= TOKENS
        and stat.top_token_energy_frac >= TOKEN_SHARE
        and stat.peak_energy_frac >= VALUE_SHARE
    )


def _high(row: Row, first: Row) -> bool:
    """A high robust z in the layer of the first anomaly or the next one: a consequence of it."""
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
    """The finding in words."""
    if found is None:
        return "no layer is anomalous compared with the layer before it and with all layers"
    text = f"{found.point} is the first anomaly: std {found.std:.4g}"
    if found.ratio_to_previous is not None:
        text += f", {found.ratio_to_previous:.3g} times the layer before"
    if found.robust_z is not None:
        text += f", robust z {found.robust_z:.2f}"
    if found.massive:
        return (
            f"{text}; one token and one channel hold the energy: a massive activation, as trained "
            "models have them, and no sign of a bug"
        )
    gain = next((g for g in gains if g.layer == found.layer), None)
    if (
        found.slot == "ffn.swiglu"
        and gain is not None
        and gain.ratio_to_previous is not None
        and gain.ratio_to_previous >= GAIN_RISE
    ):
        text += (
            f"; gate and up are in line, their product is not: gain {gain.gain:.3g}, "
            f"{gain.ratio_to_previous:.3g} times the layer before. Factors that are large in the "
            "same token and channel do that; a misaligned product, which pairs values that do not "
            "belong together, does not raise the gain"
        )
        if not has_stats:
            text += (
                ". Whether one token holds the energy was not recorded: a massive activation is "
                "likely, and not shown"
            )
    return text

"""Gates of the activations of a model in training: attention scores that grow, attention that
collapses, points that die or explode.
"""

import math
from types import SimpleNamespace

from stackproof.contracts.events import ActivationsTraced
from stackproof.contracts.gate import (
    RuntimeCheck,
    Verdict,
    decide,
    decide_all,
    decides,
    first_of,
    worst_at,
)


@decides("model.attention-logits")
class AttentionLogits(RuntimeCheck):
    """No attention score is so large that softmax selects one key and its gradient vanishes."""

    events = (ActivationsTraced,)

    def observe(self, event: ActivationsTraced) -> Verdict:
        scores = _at(event, "scores", "absmax")
        largest = worst_at(scores)
        return decide(
            scores[largest] <= self.limits.logit_abs_max,
            f"step {event.step}: a score of {largest} has grown to {scores[largest]:.4g}",
            logit_abs=scores[largest],
        )


class _InARow(RuntimeCheck):
    """Base of checks that are red for what lasts `in_a_row` traces."""

    kept = ("found",)

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.found: dict[str, int] = {}

    def lasting(self, now: list[str]) -> list[str]:
        """Those of the points that were found in the last `in_a_row` traces."""
        self.found = {name: self.found.get(name, 0) + 1 for name in now}
        return [name for name, times in self.found.items() if times >= self.limits.in_a_row]


@decides("model.attention-entropy")
class AttentionEntropy(_InARow):
    """In no layer does every head attend to a single token."""

    events = (ActivationsTraced,)

    def observe(self, event: ActivationsTraced) -> Verdict:
        entropy = _at(event, "entropy", "mean")
        lowest = min(entropy, key=entropy.get)
        lasting = self.lasting(
            [name for name, nats in entropy.items() if not nats >= self.limits.entropy_nats_min]
        )
        return decide(
            not lasting,
            f"step {event.step}: attention has collapsed in {first_of(lasting)}: "
            f"{entropy[lowest]:.3g} nats over all heads and tokens",
            entropy_nats=entropy[lowest],
        )


@decides("model.live-points")
class LivePoints(_InARow):
    """The activations at every point vary over tokens and features, and stay within the range of
    half precision.
    """

    events = (ActivationsTraced,)

    def observe(self, event: ActivationsTraced) -> Verdict:
        seen = {
            name: figures
            for name, figures in event.points.items()
            if figures["n"] > 1 and not name.endswith((".entropy", ".scores"))
        }
        dead = self.lasting(
            [name for name, figures in seen.items() if figures["std"] <= self.limits.dead_std_max]
        )
        broken = [
            name
            for name, figures in seen.items()
            if figures["frac_nonfinite"] > 0 or math.isnan(figures["absmax"])
        ]
        large = max(seen, key=lambda name: seen[name]["absmax"])
        return decide_all(
            [
                bool(broken) and f"{first_of(broken)} hold values that are not finite",
                bool(dead) and f"{first_of(dead)} no longer vary at all",
                seen[large]["absmax"] > self.limits.absmax_max
                and f"{large} has grown to {seen[large]['absmax']:.4g}",
            ],
            f"step {event.step}: ",
            absmax=seen[large]["absmax"],
            dead_std=min(figures["std"] for figures in seen.values()),
            broken=len(broken),
            dead=len(dead),
        )


def _at(event: ActivationsTraced, slot: str, figure: str) -> dict[str, float]:
    """One figure of one slot by point."""
    return {
        name: figures[figure]
        for name, figures in event.points.items()
        if name.endswith(f".{slot}") and figures["n"]
    }

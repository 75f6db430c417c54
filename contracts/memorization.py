"""Gates of memorization: the model does not continue training text word for word, and a sample with
a very low loss is searched in the corpus.
"""

import math
import statistics
from collections import deque
from types import SimpleNamespace

from stackproof.contracts.events import Event, MemorizationMeasured, Sampled
from stackproof.contracts.gate import (
    RuntimeCheck,
    Verdict,
    decide,
    decide_all,
    decides,
    not_run,
)

SELECTED = {
    "n_windows": "training passages",
    "n_held_out": "held-out passages",
    "prefix_tokens": "given tokens of each passage",
}


@decides("sampling.recitation")
class Recitation(RuntimeCheck):
    """A model continues training passages word for word no more often than held-out passages.

    The counts judged are those of the gate's own forwards over passages that it selects, where
    there are some, and the reported ones are equal. Held-out passages are continued only where the
    count of training passages alone could be red.
    Rows without a passage within one document are not judged. Source: arXiv:2012.07805.
    """

    events = (MemorizationMeasured,)

    def observe(self, event: Event) -> Verdict:
        stated = event.reported
        own = stated if event.own is None else event.own
        if not own.n_windows and not stated.n_windows:
            return not_run("no row of the step has a passage within one document")
        n, m, p_min = own.n_windows, own.n_held_out, self.limits.p_value_min
        held_out = reported = 0
        if chance_of(own.n_recited, n, 0, m) < p_min:
            held_out = own.held_out()
            reported = held_out if event.own is None else stated.held_out()
        p = chance_of(own.n_recited, n, held_out, m)
        other = [name for name in SELECTED if getattr(own, name) != getattr(stated, name)]
        recited_error = max(abs(own.n_recited - stated.n_recited), abs(held_out - reported))
        matched_error = abs(own.matched_tokens - stated.matched_tokens)
        return decide_all(
            [
                not p >= p_min
                and f"{own.n_recited} of {n} training passages are continued word for word after "
                f"{own.prefix_tokens} tokens, and {held_out} of {m} held-out passages",
                *(
                    f"{getattr(stated, name)} {SELECTED[name]} are reported, there are "
                    f"{getattr(own, name)}"
                    for name in other
                ),
                not recited_error <= (self.limits.half_recited_error_max if event.half else 0)
                and f"{stated.n_recited} training and {reported} held-out passages are reported as "
                f"recited, {own.n_recited} and {held_out} are",
                not matched_error <= (self.limits.half_matched_error_max if event.half else 0.0)
                and f"{stated.matched_tokens:g} tokens of a passage are reported as repeated on "
                f"average, {own.matched_tokens:g} are",
            ],
            f"step {event.step}: ",
            recited_frac=own.n_recited / max(1, n),
            held_out_frac=held_out / max(1, m),
            windows=n,
            matched_tokens=own.matched_tokens,
            p_value=p,
            matched_error=matched_error,
            recited_error=recited_error,
        )


def chance_of(recited: int, n: int, held_out: int, m: int) -> float:
    """Probability of `recited` or more recited training passages of `n`, given the total with
    `held_out` of `m`, if training makes no difference.

    Fisher's exact test, one-sided. With no recited passage of 32 held-out ones it falls below 1e-4
    at 12 passages of 32, and at 4 of 4; with fewer than 4 it cannot.
    """
    both = recited + held_out
    return sum(
        math.comb(n, k) * math.comb(m, both - k) for k in range(recited, min(n, both) + 1)
    ) / math.comb(n + m, both)


@decides("sampling.memorised")
class Memorized(RuntimeCheck):
    """A sample on which the model has a very low loss is not a passage of the training text."""

    events = (Sampled,)
    kept = ("losses",)

    def __init__(self, limits: SimpleNamespace):
        super().__init__(limits)
        self.losses = deque(maxlen=32)

    def observe(self, event: Event) -> Verdict | None:
        if event.loss_nats is None:
            return None
        usual = self.losses if len(self.losses) >= self.limits.known_samples_min else None
        low = (
            statistics.mean(usual) - self.limits.sigmas_below * statistics.stdev(usual)
            if usual
            else -math.inf
        )
        suspicious = event.loss_nats < max(low, self.limits.loss_nats_min)
        if not suspicious:
            self.losses.append(event.loss_nats)
        found = event.found_in_corpus() if suspicious and event.found_in_corpus else 0.0
        return decide(
            found <= self.limits.found_frac_max,
            f"step {event.step}: loss {event.loss_nats:.2f} on its own sample, {found:.0%} of "
            f"which is training text: {event.text[:60]!r}",
            sample_loss_nats=event.loss_nats,
            suspicious=suspicious,
            found_frac=found,
        )

"""Gates of the loss while a model is trained: where it starts, and what the gradient at the logits
teaches each position.
"""

import math

from stackproof.contracts.callbacks.losses import loss_measured
from stackproof.contracts.callbacks.reading import read, resolve
from stackproof.contracts.events import Event, LossMeasured, Started
from stackproof.contracts.gate import (
    RuntimeCheck,
    Verdict,
    decide,
    decides,
    failed,
    measured_by,
    not_run,
)


@decides("loss.first")
@measured_by(read, resolve, loss_measured)
class FirstLoss(RuntimeCheck):
    """The first loss of an untrained model is that of guessing, ln V; that of any other model is
    not far above it. It follows from the logits; the reported one is equal, where it is known.

    A resumed run is judged at its first step, as a trained model.
    """

    events = (Started, LossMeasured)

    def __init__(self, limits):
        super().__init__(limits)
        self.untrained, self.judged = False, False

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Started):
            self.untrained, self.judged = bool(event.plan.get("untrained")), False
            return None
        if self.judged or math.isnan(event.mean_nats):
            return None
        self.judged = True
        guessing, measured = math.log(event.vocab_size), {"loss_nats": event.mean_nats}
        if not math.isnan(event.reported_nats):
            error = abs(event.reported_nats - event.mean_nats) / max(event.mean_nats, 1e-30)
            half = "half_" if event.half else ""
            measured[f"{half}reported_rel_error"] = error
            if not error <= getattr(self.limits, f"{half}reported_rel_error_max"):
                return failed(
                    f"step {event.step}: the reported loss is {event.reported_nats:.6g} nats, the "
                    f"logits give {event.mean_nats:.6g}",
                    **measured,
                )
        over = event.mean_nats - guessing
        ok = over <= self.limits.over_random_nats_max
        if self.untrained:
            ok = ok and abs(over) <= self.limits.abs_gap_nats_max
            measured["gap_nats"] = abs(over)
        return decide(
            ok,
            f"step {event.step}: the first loss is {event.mean_nats:.4g} nats, guessing gives "
            f"ln {event.vocab_size} = {guessing:.4g}: the weights, the vocabulary or the logits "
            "are not the intended ones",
            random_nats=guessing,
            over_random_nats=over,
            **measured,
        )


@decides("loss.logit-gradient")
@measured_by(read, resolve, loss_measured)
class LogitGradient(RuntimeCheck):
    """At every judged position the gradient at the logits is that of cross-entropy with the next
    token, with the weight 1/N of the step's N labels, in whatever micro-batch it is; masked
    positions have none.
    """

    events = (LossMeasured,)

    def observe(self, event: LossMeasured) -> Verdict:
        step, limits = f"step {event.step}: ", self.limits
        measured = {
            "masked_learned": event.n_masked_learned,
            "n_learned": event.n_learned,
            "n_judged": event.n_judged,
        }
        if event.n_changed_rows is not None:
            measured["changed_rows"] = event.n_changed_rows
        if measured.get("changed_rows", 0) > limits.changed_rows_max:
            return failed(
                f"{step}{event.n_changed_rows} row(s) entered the model with other tokens or "
                "documents than were drawn, not at all, or once more",
                **measured,
            )
        off_target_frac = event.n_off_target / max(1, event.n_judged)
        if event.n_judged:
            measured |= {"off_target_frac": off_target_frac, "offset": event.offset}
        if off_target_frac > limits.off_target_frac_max:
            target = {0: "the token itself", 2: "the token after the next"}.get(
                event.offset, "another target or none"
            )
            return failed(
                f"{step}{event.n_off_target} of {event.n_judged} positions learn {target}, not the "
                "next token",
                **measured,
            )
        if event.n_masked_learned > limits.masked_learned_max:
            return failed(
                f"{step}{event.n_masked_learned} masked position(s) are learned", **measured
            )
        if not event.n_judged:
            return not_run(f"{step}no learned position could be inspected")
        low, high = event.weight_min, event.weight_max
        half, error = "half_" if event.half else "", _spread(low, high, event.absolute)
        measured |= {f"{half}rel_error": error, "weight_min": low, "weight_max": high}
        ok = error <= getattr(limits, f"{half}rel_error_max")
        if event.half and ok:
            low, high = event.single_min, event.single_max
            single = measured["half_single_rel_error"] = _spread(low, high, event.absolute)
            ok = single <= limits.half_single_rel_error_max
        return decide(
            ok,
            f"{step}tokens have {low:.4g} to {high:.4g} times the weight of one in "
            f"{event.n_learned}",
            **measured,
        )


def _spread(low: float, high: float, absolute: bool) -> float:
    """How far weights in units of 1/N are apart, or from 1 if they can be compared with it."""
    apart = (high - low) / high if high > 0 else math.inf
    return max(apart, abs(high - 1), abs(low - 1)) if absolute else apart

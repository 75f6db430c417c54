"""Gates of the loss while a model is trained: where it starts, which token each position learns,
and with what weight.
"""

import math

from stackproof.contracts.events import Event, LossMeasured, Started
from stackproof.contracts.gate import RuntimeCheck, Verdict, decide, decides, not_run


@decides("loss.first")
class FirstLoss(RuntimeCheck):
    """The first loss of an untrained model is that of guessing, ln V; that of any other model is
    not far above it.

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
        guessing = math.log(event.vocab_size)
        over = event.mean_nats - guessing
        ok = over <= self.limits.over_random_nats_max
        if self.untrained:
            ok = ok and abs(over) <= self.limits.abs_gap_nats_max
        return decide(
            ok,
            f"step {event.step}: the first loss is {event.mean_nats:.4g} nats, guessing gives "
            f"ln {event.vocab_size} = {guessing:.4g}: the weights, the vocabulary or the logits "
            "are not the intended ones",
            loss_nats=event.mean_nats,
            random_nats=guessing,
            over_random_nats=over,
            **({"gap_nats": abs(over)} if self.untrained else {}),
        )


@decides("loss.next-token")
class NextToken(RuntimeCheck):
    """At every learned position the gradient at the logits is that of cross-entropy with the next
    token.
    """

    events = (LossMeasured,)

    def observe(self, event: LossMeasured) -> Verdict:
        if not event.n_judged:
            return not_run(f"step {event.step}: no learned position could be inspected")
        share = event.n_off_target / event.n_judged
        target = {0: "the token itself", 2: "the token after the next"}.get(
            event.offset, "another target"
        )
        return decide(
            share <= self.limits.off_target_frac_max,
            f"step {event.step}: {event.n_off_target} of {event.n_judged} positions learn "
            f"{target}, not the next token",
            off_target_frac=share,
            n_judged=event.n_judged,
            offset=event.offset,
        )


@decides("loss.token-weights")
class TokenWeights(RuntimeCheck):
    """Every token to learn has the weight 1/N of the step's N tokens, in whatever micro-batch it
    is; masked positions have none.
    """

    events = (LossMeasured,)

    def observe(self, event: LossMeasured) -> Verdict:
        if event.n_masked_learned > self.limits.masked_learned_max:
            return decide(
                False,
                f"step {event.step}: {event.n_masked_learned} masked position(s) are learned",
                n_masked_learned=event.n_masked_learned,
                n_learned=event.n_learned,
            )
        if not event.n_judged:
            return not_run(f"step {event.step}: no learned position could be inspected")
        spread = (
            (event.weight_max - event.weight_min) / event.weight_max
            if event.weight_max > 0
            else math.inf
        )
        off = max(abs(event.weight_max - 1), abs(event.weight_min - 1)) if event.absolute else 0.0
        return decide(
            max(spread, off) <= self.limits.rel_error_max,
            f"step {event.step}: tokens have {event.weight_min:.4g} to {event.weight_max:.4g} "
            f"times the weight of one in {event.n_learned}",
            weight_min=event.weight_min,
            weight_max=event.weight_max,
            n_learned=event.n_learned,
            n_masked_learned=event.n_masked_learned,
        )

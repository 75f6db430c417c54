"""Gates of a trainer that is not ours, at run time: what its loss, gradients, weights,
rates and modes show from outside.

Each event holds plain numbers that `stackproof.contracts.callbacks.watch` took at the source: at
the logits, before any logger.
"""

import math
from dataclasses import dataclass

from stackproof.contracts.gate import Stateless, Verdict, decide, decides, not_run


@dataclass(frozen=True, slots=True)
class BatchSeen:
    """One batch on its way into the model, before it is used.
    `max_length` and `embedding_rows` are 0 where unknown.

    `n_stops` counts stop tokens that follow a learned token and are no padding, `n_stops_learned`
    those of them that have a label. `n_left_padded` counts rows that begin with padding which no
    mask tells. Of `n_places` position ids that have a token before them, `n_places_up` are one more
    than the one before.
    """

    step: int
    n_rows: int
    length: int
    max_length: int
    min_id: int
    max_id: int
    embedding_rows: int
    n_labels: int
    n_valid: int
    n_stops: int = 0
    n_stops_learned: int = 0
    n_padding_labels: int = 0
    n_left_padded: int = 0
    n_places: int = 0
    n_places_up: int = 0


@dataclass(frozen=True, slots=True)
class LossRead:
    """The loss of one optimizer step as its gradient at the logits tells it, over all micro-steps.

    `n_judged` positions were looked at one by one; `n_off_target` of them are not taught the next
    token, and `offset` is the distance of the token most of those are taught instead (-1: none of
    0, 1, 2). `weight_min` and `weight_max` are the weights of judged positions in units of 1/N, N
    being the tokens to learn in this step. `n_masked_learned` counts positions with gradient though
    label or mask say there is nothing to learn.
    """

    step: int
    n_learned: int
    n_judged: int
    n_off_target: int
    offset: int
    n_masked_learned: int
    weight_min: float
    weight_max: float
    mean_nats: float
    vocab_size: int
    absolute: bool = True


@dataclass(frozen=True, slots=True)
class GradientsSeen:
    """Gradients between the backward passes of one step and its update.

    `stale_norm` is what lay there before the first backward pass, `lost` counts passes after which
    gradients changed before the next, `factor_spread` is how much the factor between the last pass
    and the update differs among tensors, relative to the largest. `usual` is the largest number of
    passes an update has had before, 0 where there was none yet. Shown before every update, and once
    when passes have become many more than usual without one.
    """

    step: int
    micro_steps: int
    stale_norm: float
    lost: int
    factor_spread: float
    usual: int = 0


@dataclass(frozen=True, slots=True)
class RatesUsed:
    """Learning rates by group as one update used them; `declared` by the scheduler's own closed
    form, empty where it has none.

    `ticks` counts the scheduler's steps since the run was first seen, `updates` the optimizer's.
    """

    step: int
    used: tuple[float, ...]
    declared: tuple[float, ...]
    ticks: int
    updates: int


@dataclass(frozen=True, slots=True)
class ModeSeen:
    """One forward pass: `phase` is training or evaluation, `wrong` names modules in
    the mode of the other phase.

    `repeat_abs` is the largest difference of two evaluations of the same batch,
    None where it was not asked.
    """

    step: int
    phase: str
    wrong: tuple[str, ...]
    repeat_abs: float | None = None


@dataclass(frozen=True, slots=True)
class StateRestored:
    """A run went on from a checkpoint; `differing` names what is not as it was when
    the checkpoint was written.
    """

    step: int
    differing: tuple[str, ...]
    compared: int


@decides("data.learnable-batch")
class LearnableBatch(Stateless):
    """Ids are in the vocabulary, rows are not too long, something is to be learned,
    the stop token too, and padding is not.
    """

    events = (BatchSeen,)

    def observe(self, event: BatchSeen) -> Verdict:
        outside = event.min_id < 0 or (
            bool(event.embedding_rows) and event.max_id >= event.embedding_rows
        )
        wrong = [
            text
            for bad, text in (
                (
                    outside,
                    (
                        f"id {event.max_id if event.min_id >= 0 else event.min_id} is outside the "
                        f"{event.embedding_rows} of the embedding"
                    ),
                ),
                (
                    bool(event.max_length) and event.length > event.max_length,
                    f"rows of {event.length} exceed {event.max_length} positions",
                ),
                (
                    event.n_labels > 0 and event.n_valid < self.limits.valid_min,
                    "no label is left to learn from",
                ),
                (
                    event.n_stops > 0 and event.n_stops_learned == 0,
                    f"{event.n_stops} stop token(s) end learned text, none has a label",
                ),
                (
                    event.n_padding_labels > self.limits.padding_labels_max,
                    f"{event.n_padding_labels} label(s) stand on padding",
                ),
                (
                    event.n_left_padded > self.limits.left_padded_max,
                    (
                        f"{event.n_left_padded} row(s) begin with padding that the attention_mask "
                        "takes for text"
                    ),
                ),
                (
                    event.n_places_up < self.limits.places_up_frac_min * event.n_places,
                    (
                        f"only {event.n_places_up} of {event.n_places} position_ids are one more "
                        "than the one before"
                    ),
                ),
            )
            if bad
        ]
        return decide(
            not wrong,
            f"step {event.step}: {'; '.join(wrong)}",
            max_id=event.max_id,
            embedding_rows=event.embedding_rows,
            length=event.length,
            n_valid=event.n_valid,
            n_stops=event.n_stops,
            n_stops_learned=event.n_stops_learned,
            n_padding_labels=event.n_padding_labels,
            n_left_padded=event.n_left_padded,
            places_up_frac=event.n_places_up / event.n_places if event.n_places else 1.0,
        )


@decides("loss.next-token")
class NextToken(Stateless):
    """At every learned position the gradient at the logits is that of
    cross-entropy with the next token.
    """

    events = (LossRead,)

    def observe(self, event: LossRead) -> Verdict:
        if not event.n_judged:
            return not_run(f"step {event.step}: no learned position could be judged")
        share = event.n_off_target / event.n_judged
        taught = {0: "the token itself", 2: "the token after the next"}.get(
            event.offset, "another target"
        )
        return decide(
            share <= self.limits.off_target_frac_max,
            f"step {event.step}: {event.n_off_target} of {event.n_judged} positions are taught "
            f"{taught}, not the next token",
            off_target_frac=share,
            n_judged=event.n_judged,
            offset=event.offset,
        )


@decides("loss.token-weights")
class TokenWeights(Stateless):
    """Every token to learn weighs 1/N of the step's N, whatever its micro-batch;
    what is masked weighs nothing.
    """

    events = (LossRead,)

    def observe(self, event: LossRead) -> Verdict:
        if event.n_masked_learned > self.limits.masked_learned_max:
            return decide(
                False,
                f"step {event.step}: {event.n_masked_learned} masked position(s) are learned",
                n_masked_learned=event.n_masked_learned,
                n_learned=event.n_learned,
            )
        if not event.n_judged:
            return not_run(f"step {event.step}: no learned position could be judged")
        spread = (
            (event.weight_max - event.weight_min) / event.weight_max
            if event.weight_max > 0
            else math.inf
        )
        off = max(abs(event.weight_max - 1), abs(event.weight_min - 1)) if event.absolute else 0.0
        return decide(
            max(spread, off) <= self.limits.rel_error_max,
            f"step {event.step}: tokens weigh {event.weight_min:.4g} to {event.weight_max:.4g} of "
            f"what one of {event.n_learned} should",
            weight_min=event.weight_min,
            weight_max=event.weight_max,
            n_learned=event.n_learned,
            n_masked_learned=event.n_masked_learned,
        )


@decides("model.first-loss")
class FirstLoss:
    """A model that has learned nothing guesses, one that has learned does better;
    neither begins far above ln V.
    """

    events = (LossRead,)

    def __init__(self, limits):
        self.limits, self.asked = limits, False

    def observe(self, event: LossRead) -> Verdict | None:
        if self.asked or not event.n_judged:
            return None
        self.asked = True
        guessing = math.log(event.vocab_size)
        return decide(
            event.mean_nats <= guessing + self.limits.over_random_nats_max,
            f"the first loss is {event.mean_nats:.4g} nats, guessing gives ln {event.vocab_size} "
            f"= {guessing:.4g}: other weights, another vocabulary or other logits than were meant",
            loss_nats=event.mean_nats,
            random_nats=guessing,
        )

    def state_dict(self) -> dict:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict) -> None:
        self.asked = state["asked"]


@decides("optim.gradient-kept")
class GradientKept(Stateless):
    """Gradients are empty when a step begins, add up over its micro-steps, and reach the update as
    they are or scaled as one.
    """

    events = (GradientsSeen,)

    def observe(self, event: GradientsSeen) -> Verdict:
        wrong = [
            text
            for bad, text in (
                (
                    event.stale_norm > self.limits.stale_norm_max,
                    f"gradients of norm {event.stale_norm:.4g} were left from before",
                ),
                (
                    event.lost > self.limits.lost_max,
                    f"after {event.lost} of {event.micro_steps} micro-steps gradients were changed",
                ),
                (
                    not event.factor_spread <= self.limits.factor_spread_max,
                    (
                        "some tensors' gradients were changed before the update, by factors "
                        f"{event.factor_spread:.3g} apart"
                    ),
                ),
                (
                    event.micro_steps
                    > self.limits.passes_factor_max * (event.usual or self.limits.first_passes_max),
                    (
                        f"{event.micro_steps} backward passes and no update, which came after "
                        f"{event.usual or 'none'} before"
                    ),
                ),
            )
            if bad
        ]
        return decide(
            not wrong,
            f"step {event.step}: {'; '.join(wrong)}",
            stale_norm=event.stale_norm,
            lost=event.lost,
            micro_steps=event.micro_steps,
            factor_spread=event.factor_spread,
        )


@decides("schedule.declared-rate")
class DeclaredRate:
    """Each update uses the rate its own scheduler declares for it, at most one tick an update,
    and no group stands at zero.
    """

    events = (RatesUsed,)

    def __init__(self, limits):
        self.limits, self.zeros = limits, 0

    def observe(self, event: RatesUsed) -> Verdict:
        errors = [
            abs(u - d) / max(abs(d), abs(u)) if u != d else 0.0
            for u, d in zip(event.used, event.declared)
        ]
        self.zeros = self.zeros + 1 if min(event.used) == 0 else 0
        ahead = event.ticks - event.updates
        wrong = [
            text
            for bad, text in (
                (
                    max(errors, default=0.0) > self.limits.rel_error_max,
                    f"rates {event.used} are used, {event.declared} are declared",
                ),
                (
                    ahead > self.limits.ticks_ahead_max,
                    f"the schedule has ticked {event.ticks} times in {event.updates} updates",
                ),
                (
                    self.zeros > self.limits.zero_updates_max,
                    f"a learning rate is 0 for the {self.zeros}th update in a row",
                ),
            )
            if bad
        ]
        return decide(
            not wrong,
            f"step {event.step}: {'; '.join(wrong)}",
            rel_error=max(errors, default=0.0),
            ticks=event.ticks,
            updates=event.updates,
            zero_updates=self.zeros,
            lr=event.used[0],
        )

    def state_dict(self) -> dict:
        return {"zeros": self.zeros}

    def load_state_dict(self, state: dict) -> None:
        self.zeros = state["zeros"]


@decides("evaluation.mode")
class Mode(Stateless):
    """Held-out batches are scored in evaluation mode, twice the same;
    training batches in training mode.
    """

    events = (ModeSeen,)

    def observe(self, event: ModeSeen) -> Verdict:
        repeat = event.repeat_abs or 0.0
        text = (
            f"{len(event.wrong)} module(s) in the other mode, first {event.wrong[0] or 'the model'}"
            if event.wrong
            else ""
        )
        if repeat > self.limits.repeat_abs_max:
            text = f"{text + '; ' if text else ''}the same batch gives logits {repeat:.3g} apart"
        return decide(
            len(event.wrong) <= self.limits.wrong_modules_max
            and repeat <= self.limits.repeat_abs_max,
            f"step {event.step}, {event.phase}: {text}",
            phase=event.phase,
            wrong_modules=len(event.wrong),
            repeat_abs=repeat,
        )


@decides("checkpoint.state-restored")
class Restored(Stateless):
    """Weights, optimizer, schedule, random state and data go on where the checkpoint left them."""

    events = (StateRestored,)

    def observe(self, event: StateRestored) -> Verdict:
        return decide(
            len(event.differing) <= self.limits.differing_max and event.compared > 0,
            f"step {event.step}: not as saved: {', '.join(event.differing[:5])}",
            differing=len(event.differing),
            compared=event.compared,
        )

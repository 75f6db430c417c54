"""Gates of an update: the gradients that reach it, and the weights that it changes."""

from stackproof.contracts.events import (
    Event,
    GradientsAccumulated,
    StateCompared,
    WeightsUpdated,
)
from stackproof.contracts.gate import (
    RuntimeCheck,
    Verdict,
    decide,
    decide_all,
    decides,
    first_of,
    not_run,
)


@decides("optim.gradient-kept")
class GradientKept(RuntimeCheck):
    """Gradients are empty when a step begins, add up over its micro-steps, and reach the update
    unchanged or scaled by one factor.
    """

    events = (GradientsAccumulated,)

    def observe(self, event: GradientsAccumulated) -> Verdict:
        limits = self.limits
        return decide_all(
            [
                event.stale_norm > limits.stale_norm_max
                and f"gradients of norm {event.stale_norm:.4g} were left from before"
                + ("" if event.micro_steps else ", and no backward pass came since"),
                event.lost > limits.lost_max
                and f"gradients changed after {event.lost} of {event.micro_steps} micro-steps",
                not event.factor_spread <= limits.factor_spread_max
                and (
                    "some tensors' gradients were changed before the update, by factors "
                    f"{event.factor_spread:.3g} apart"
                ),
                event.micro_steps
                > limits.passes_factor_max * (event.usual or limits.first_passes_max)
                and (
                    f"{event.micro_steps} backward passes without an update; an update took at "
                    f"most {event.usual} before"
                ),
            ],
            f"step {event.step}: ",
            stale_norm=event.stale_norm,
            lost=event.lost,
            micro_steps=event.micro_steps,
            factor_spread=event.factor_spread,
        )


@decides("optim.lost-updates")
class LostUpdates(RuntimeCheck):
    """Weights change where they have a gradient."""

    events = (WeightsUpdated,)

    def __init__(self, limits):
        super().__init__(limits)
        self.in_a_row = 0

    def observe(self, event: WeightsUpdated) -> Verdict | None:
        if event.lost_frac is None:
            return None
        lost = event.lost_frac > self.limits.lost_frac_max
        self.in_a_row = self.in_a_row + 1 if lost else 0
        return decide(
            self.in_a_row < self.limits.updates_in_a_row_min,
            f"step {event.step}: {event.lost_frac:.0%} of the entries of a matrix have a gradient "
            "and do not change: the update is below their rounding",
            lost_frac=event.lost_frac,
            updates_in_a_row=self.in_a_row,
        )


@decides("optim.movement")
class Movement(RuntimeCheck):
    """An update changes what it must: trained tensors change, frozen ones do not, the first update
    goes against the gradient, and nothing changes between updates.

    Below `visible_lr_min` a step is smaller than float32's spacing at one, so gains of norms may
    rightly stay; then any change counts. Once the direction of an optimizer's first update cannot
    be known, the verdict is not_run, or what is wrong.
    """

    events = (WeightsUpdated, StateCompared)
    kept = ("unknown", "updated")

    def __init__(self, limits):
        super().__init__(limits)
        self.unknown, self.updated = "", False

    def missing(self) -> str:
        return "" if self.updated else "an update"

    def observe(self, event: Event) -> Verdict:
        if isinstance(event, StateCompared):
            verdict = self._unchanged(event)
        else:
            self.updated = True
            self.unknown = self.unknown or event.unknown
            verdict = self._changed(event)
        return not_run(self.unknown) if self.unknown and verdict.passed else verdict

    def _unchanged(self, event: StateCompared) -> Verdict:
        n = len(event.differing)
        return decide(
            n <= self.limits.changed_between_max,
            f"step {event.step}: {n} of {event.n_compared} parts of the training state changed "
            f"without an update ({event.section}): {first_of(event.differing, 4)}",
            changed_between=n,
            compared=event.n_compared,
        )

    def _changed(self, event: WeightsUpdated) -> Verdict:
        limits = self.limits
        least = limits.changed_tensor_frac_min if event.lr >= limits.visible_lr_min else 0.0
        changed = event.changed_frac
        return decide_all(
            [
                len(event.frozen_changed) > limits.frozen_moved_max
                and f"{first_of(event.frozen_changed, 4)} is frozen and changed",
                event.longest_still > limits.still_updates_max
                and (
                    f"{event.stillest} has not changed, or has had no gradient but zero, in "
                    f"{event.longest_still} updates"
                ),
                event.uphill is not None
                and not event.uphill <= limits.uphill_cosine_max
                and (
                    "the first update goes the wrong way along its gradient (cosine "
                    f"{event.uphill or 0.0:.3g})"
                ),
                len(event.miscounted) > limits.miscounted_max
                and (
                    "the optimizer has not counted this update once for "
                    f"{first_of(event.miscounted, 4)}"
                ),
                changed is not None
                and (changed < least or changed == 0)
                and f"only {changed or 0.0:.0%} of the parameter tensors changed",
            ],
            f"step {event.step}: ",
            **(
                {"changed_tensor_frac": changed}
                if changed is not None
                else {
                    "frozen_moved": len(event.frozen_changed),
                    "longest_still": event.longest_still,
                    "moved_frac": event.moved_frac,
                    "miscounted": len(event.miscounted),
                }
            ),
            **({} if event.uphill is None else {"uphill_cosine": event.uphill}),
        )

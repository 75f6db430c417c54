"""Gate of reported losses: they are those of the model as it is."""

from stackproof.contracts.events import Evaluated, Event, LossRescored
from stackproof.contracts.gate import RuntimeCheck, Verdict, decide, decides


@decides("evaluation.rescored")
class Rescored(RuntimeCheck):
    """A batch of each evaluation, and each sample, scored again, has the mean that was reported."""

    events = (Evaluated, LossRescored)

    def observe(self, event: Event) -> Verdict | None:
        if isinstance(event, Evaluated):
            return None
        allowed = self.limits.half_rel_error_max if event.half else self.limits.rel_error_max
        error = abs(event.own_nats - event.reported_nats) / max(1.0, abs(event.own_nats))
        return decide(
            error <= allowed,
            f"step {event.step}: {event.what} was reported with "
            f"{event.reported_nats:.7g} nats, scored again it has {event.own_nats:.7g}",
            rel_error=error,
        )

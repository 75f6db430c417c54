"""Gate of what the updates of a foreign trainer move, to the bit,
and of where the first of them goes.
"""

from dataclasses import dataclass

from stackproof.contracts.gate import Stateless, Verdict, decide, decides, not_run


@dataclass(frozen=True, slots=True)
class Moved:
    """Which tensors one update moved.
    `longest_still` is the longest run of updates in which a tensor with gradient has not moved.

    `uphill` is the cosine of movement and gradient at the first update of an optimizer that moves
    anything, None at all others; with the sign turned where the optimizer is asked to maximise, so
    that more than 0 is always the wrong way. `unknown` says why that update came and its direction
    cannot be known.
    """

    step: int
    frozen_moved: tuple[str, ...]
    longest_still: int
    stillest: str
    moved_frac: float
    uphill: float | None = None
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """What changed between one update and the next, when nothing should: names in `changed`,
    out of `compared` tensors.
    """

    step: int
    changed: tuple[str, ...]
    compared: int


@decides("optim.moves")
class Moves(Stateless):
    """What is frozen stays bit for bit, what has a gradient and a learning rate moves,
    and nothing moves but in an update.

    Where the direction of the first update that moved anything cannot be known, it says not_run
    from there on, or what is wrong.
    """

    events = (Moved, LeftAlone)

    def __init__(self, limits):
        super().__init__(limits)
        self.unknown = ""

    def observe(self, event: Moved | LeftAlone) -> Verdict:
        self.unknown = self.unknown or getattr(event, "unknown", "")
        verdict = self._judged(event)
        return not_run(self.unknown) if self.unknown and verdict.passed else verdict

    def _judged(self, event: Moved | LeftAlone) -> Verdict:
        if isinstance(event, LeftAlone):
            return decide(
                len(event.changed) <= self.limits.changed_between_max,
                f"step {event.step}: {len(event.changed)} parameter(s) changed since the last "
                f"update, first {', '.join(event.changed[:4])}",
                changed_between=len(event.changed),
                compared=event.compared,
            )
        still = event.longest_still > self.limits.still_updates_max
        uphill = event.uphill is not None and not event.uphill <= self.limits.uphill_cosine_max
        text = (
            f"{', '.join(event.frozen_moved[:4])} is frozen and moved" if event.frozen_moved else ""
        )
        if still:
            text = (
                f"{event.stillest} has a gradient and has not moved in {event.longest_still} "
                "updates"
            )
        if uphill:
            text = (
                "the first update goes the wrong way along its gradient (cosine "
                f"{event.uphill:.3g}), against what the optimizer is for"
            )
        return decide(
            not still and not uphill and len(event.frozen_moved) <= self.limits.frozen_moved_max,
            f"step {event.step}: {text}",
            frozen_moved=len(event.frozen_moved),
            longest_still=event.longest_still,
            moved_frac=event.moved_frac,
            **({} if event.uphill is None else {"uphill_cosine": event.uphill}),
        )

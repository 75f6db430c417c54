"""Gate of the rows that a foreign trainer draws: are they shuffled anew, and are those that are
scored others than those trained on?
"""

from dataclasses import dataclass

from stackproof.contracts.events import Started
from stackproof.contracts.gate import Verdict, decides, failed, not_run, passed
from stackproof.contracts.witness import StateRestored


@dataclass(frozen=True, slots=True)
class RowsSeen:
    """The rows of one forward pass as numbers that equal rows share.
    `phase` is training or evaluation; short rows are left out.
    """

    step: int
    phase: str
    rows: tuple[int, ...]


@decides("data.fresh-rows")
class FreshRows:
    """Rows do not come again in the order they had, and few of those that
    are scored were trained on.

    An order is the same where each of many rows in a row comes the same distance after it came
    before: an epoch that is not shuffled anew, or one batch again and again. Remembers the first
    `MEMORY` rows. Where a red verdict could not have come, because too few rows were drawn or
    scored, or rows are not known that were trained on before a resume or beyond the memory, it says
    not_run. An evaluation of too few rows leaves the verdict of one before it, unless a row of it
    was trained on.
    """

    events = (RowsSeen, Started, StateRestored)
    MEMORY = 500_000

    def __init__(self, limits):
        self.limits = limits
        self.trained: dict[int, int] = {}
        self.drawn = self.lag = self.in_order = self.again = 0
        self.scored = self.known = 0
        self.step, self.resumed_at, self.full, self.unscored, self.judged = 0, 0, False, "", False

    def observe(self, event: RowsSeen | Started | StateRestored) -> Verdict | None:
        if not isinstance(event, RowsSeen):
            if event.step > self.step:
                self.resumed_at = event.step
            return None
        if event.phase == "evaluation":
            return self._scored(event)
        self.scored, self.known, self.step = 0, 0, event.step
        for row in event.rows:
            self._draw(row)
        measured = {"rows_in_order": self.in_order, "drawn": self.drawn}
        if self.in_order > self.limits.rows_in_order_max:
            again = (
                f"the last {self.in_order} rows came in the order they had {self.lag} rows before"
            )
            return failed(
                f"step {event.step}: {again}: nothing shuffles, or not anew each epoch", **measured
            )
        return self._unless(self._unordered() or self.unscored, measured)

    def _draw(self, row: int) -> None:
        before = self.trained.get(row)
        if before is not None or len(self.trained) < self.MEMORY:
            self.trained[row] = self.drawn
        else:
            self.full = True
        lag = 0 if before is None else self.drawn - before
        self.in_order = self.in_order + 1 if lag and lag == self.lag else int(lag > 0)
        self.lag, self.drawn, self.again = lag, self.drawn + 1, self.again + (lag > 0)

    def _unordered(self) -> str:
        """Why an order could not have been seen, or nothing."""
        least = int(self.limits.rows_in_order_max) + 2
        if self.drawn < least:
            return f"fewer than {least} rows that are long enough were drawn, too few for an order"
        if self.resumed_at and self.again <= self.limits.rows_in_order_max:
            return (
                f"rows drawn before step {self.resumed_at} are not known, and those since have "
                "hardly come again"
            )
        return (
            f"only the first {self.MEMORY:,} rows are remembered, and there were more"
            if self.full
            else ""
        )

    def _scored(self, event: RowsSeen) -> Verdict:
        """All batches of one evaluation together, from the number of rows on at
        which a share says something.
        """
        self.scored, self.known = (
            self.scored + len(event.rows),
            self.known + sum(r in self.trained for r in event.rows),
        )
        measured = {"trained_frac": self.known / max(1, self.scored), "scored": self.scored}
        if self.scored < self.limits.scored_min:
            if self.known or not self.judged:
                few = (
                    f"an evaluation had {self.scored} rows that are long enough, {self.known} of "
                    "them trained on"
                )
                self.unscored = (
                    f"{few}: a share is judged from {int(self.limits.scored_min)} rows on"
                )
            return self._unless(self.unscored or self._unordered(), measured)
        if measured["trained_frac"] > self.limits.trained_frac_max:
            return failed(
                f"step {event.step}: {self.known} of {self.scored} held-out rows were trained on",
                **measured,
            )
        before = (
            f"rows trained on before step {self.resumed_at} are not known; held-out rows may be "
            "among them"
        )
        self.judged, self.unscored = True, before if self.resumed_at else ""
        return self._unless(self.unscored or self._unordered(), measured)

    def _unless(self, reason: str, measured: dict) -> Verdict:
        return not_run(reason) if reason else passed(**measured)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        return None

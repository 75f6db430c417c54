"""Gate of the rows that a foreign trainer draws: are they shuffled anew, and are those that are scored others than those trained on?"""

from dataclasses import dataclass

from contracts.gate import Verdict, decide, decides


@dataclass(frozen=True, slots=True)
class RowsSeen:
    """The rows of one forward pass as numbers that equal rows share. `phase` is training or evaluation; short rows are left out."""

    step: int
    phase: str
    rows: tuple[int, ...]


@decides("data.fresh-rows")
class FreshRows:
    """Rows do not come again in the order they had, and few of those that are scored were trained on.

    An order is the same where each of many rows in a row comes the same distance after it came before: an epoch that is not
    shuffled anew, or one batch again and again. Remembers at most `MEMORY` rows; later ones are not judged.
    """

    events = (RowsSeen,)
    MEMORY = 500_000

    def __init__(self, limits):
        self.limits = limits
        self.trained: dict[int, int] = {}
        self.drawn = self.lag = self.in_order = 0
        self.scored = self.known = 0

    def observe(self, event: RowsSeen) -> Verdict | None:
        if event.phase == "evaluation":
            return self._scored(event)
        self.scored = self.known = 0
        if len(self.trained) >= self.MEMORY:
            return None
        for row in event.rows:
            before, self.trained[row] = self.trained.get(row), self.drawn
            lag = 0 if before is None else self.drawn - before
            self.in_order = self.in_order + 1 if lag and lag == self.lag else int(lag > 0)
            self.lag, self.drawn = lag, self.drawn + 1
        again = f"the last {self.in_order} rows came in the order they had {self.lag} rows before: nothing shuffles, or not anew each epoch"
        return decide(
            self.in_order <= self.limits.rows_in_order_max, f"step {event.step}: {again}", rows_in_order=self.in_order, drawn=self.drawn
        )

    def _scored(self, event: RowsSeen) -> Verdict | None:
        """All batches of one evaluation together, from the number of rows on at which a share says something."""
        self.scored, self.known = self.scored + len(event.rows), self.known + sum(r in self.trained for r in event.rows)
        if self.scored < self.limits.scored_min:
            return None
        share = self.known / self.scored
        return decide(
            share <= self.limits.trained_frac_max,
            f"step {event.step}: {self.known} of {self.scored} held-out rows were trained on",
            trained_frac=share,
            scored=self.scored,
        )

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        return None
